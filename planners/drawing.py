"""The frame of every picture that a planner draws: matplotlib without its global state, loaded when it is needed.

matplotlib is optional (``pip install 'distrain[plot]'``).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distrain.core.errors import ConfigError, MissingDependencyError, Problem

Painter = Callable[[Any], None]
"""draws on one matplotlib Axes"""


def require() -> None:
    """Find out before a long search whether there can be plots; MissingDependencyError if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        hint = "pip install 'distrain[plot]'"
        raise MissingDependencyError("plots need matplotlib", got="it is not installed", hint=hint)


def check(path: Path) -> Iterator[Problem]:
    """What keeps a picture from being written to ``path``, found before a long search; as ``require``, too."""
    require()
    known = import_module("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        yield Problem("a plot has a format by the ending of its name", str(path), ", ".join(sorted(known)))
    if os.path.isdir(path) or not os.path.isdir(path.absolute().parent):
        yield Problem("a plot cannot be written", str(path), "a file in a folder that is there")


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
