"""The frame of every picture that a planner draws: matplotlib without its global state, loaded when it is needed.

matplotlib is optional (``pip install 'distrain[plot]'``).
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distrain.core.errors import ConfigError, MissingDependencyError

Painter = Callable[[Any], None]
"""draws on one matplotlib Axes"""


def require() -> None:
    """Find out before a long search whether there can be plots; MissingDependencyError if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        hint = "pip install 'distrain[plot]'"
        raise MissingDependencyError("plots need matplotlib", got="it is not installed", hint=hint)


def draw(path: Path, painters: Sequence[Painter], *, columns: int = 1) -> None:
    """Write one picture with a panel for each of ``painters``; the ending of ``path`` says which format.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: the file cannot be written, or there is no such format.
    """
    require()
    rows = -(-len(painters) // columns)
    figure = import_module("matplotlib.figure").Figure(
        figsize=(8 * columns, 4.5 * rows), layout="constrained"
    )
    for number, paint in enumerate(painters):
        paint(figure.add_subplot(rows, columns, number + 1))
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise ConfigError("a plot cannot be written", got=f"{path}: {error}") from None
