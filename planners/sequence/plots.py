"""A picture of a plan: which slots are busy when, coloured by the degree of their group.

matplotlib is optional (``pip install 'distrain[plot]'``) and used without its global state.
"""

from importlib.util import find_spec
from itertools import groupby
from math import log2
from pathlib import Path

from distrain.core.errors import ConfigError, MissingDependencyError

from .step_plan import StepPlan, replay


def require() -> None:
    """Find out before the planning whether there can be a plot.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        hint = "pip install 'distrain[plot]'"
        raise MissingDependencyError("plots need matplotlib", got="it is not installed", hint=hint)


def draw(plan: StepPlan, path: Path) -> None:
    """Write slots over time to ``path``, in the format of its suffix.

    Raises:
        ConfigError: matplotlib writes no such format.
        OSError: the file cannot be written.
    """
    require()
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["viridis"]
    batches = replay(plan.microbatches, num_slots=plan.num_slots, schedule=plan.schedule)
    busy = [started for groups in batches for started in groups]
    degrees = sorted({group.degree for group, _ in busy})
    shades = {degree: colours(log2(degree) / max(1.0, log2(max(degrees)))) for degree in degrees}
    for degree, members in groupby(sorted(busy, key=lambda one: one[0].degree), lambda one: one[0].degree):
        chosen = list(members)
        axes.barh(
            [group.ranks[0] for group, _ in chosen],
            [group.estimated_ms for group, _ in chosen],
            height=degree,
            left=[start_ms for _, start_ms in chosen],
            align="edge",
            color=shades[degree],
            edgecolor="white",
            linewidth=0.4,
        )
    axes.set(
        xlabel="ms",
        ylabel="slot",
        ylim=(0, plan.num_slots),
        xlim=(0, plan.estimated_ms),
        title=f"{plan.estimated_ms:,.0f} ms, {plan.schedule}, gap {plan.gap:.1%}",
    )
    axes.axvline(plan.lower_bound_ms, color="crimson", linestyle="--", linewidth=1)
    handles = [Patch(color=shades[degree], label=f"degree {degree}") for degree in degrees]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ConfigError("no picture of this format can be drawn", got=f"{path}: {error}") from None
