"""A picture of a plan: which slots are busy when, coloured by the degree of their group."""

from importlib import import_module
from itertools import groupby
from math import log2
from typing import Any

from ..drawing import Painter
from .step_plan import StepPlan, replay


def slots_over_time(plan: StepPlan) -> Painter:
    """Slots over time, with the bound as a line."""

    def paint(axes: Any) -> None:
        batches = replay(plan.microbatches, num_slots=plan.num_slots, schedule=plan.schedule)
        busy = [started for groups in batches for started in groups]
        degrees = sorted({group.degree for group, _ in busy})
        colours = import_module("matplotlib").colormaps["viridis"]
        shades = {degree: colours(log2(degree) / max(1.0, log2(max(degrees)))) for degree in degrees}
        for degree, members in groupby(
            sorted(busy, key=lambda one: one[0].degree), lambda one: one[0].degree
        ):
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
                label=f"degree {degree}",
            )
        axes.set(
            xlabel="ms",
            ylabel="slot",
            ylim=(0, plan.num_slots),
            xlim=(0, plan.estimated_ms),
            title=f"{plan.estimated_ms:,.0f} ms, {plan.schedule}, gap {plan.gap:.1%}",
        )
        axes.axvline(plan.lower_bound_ms, color="crimson", linestyle="--", linewidth=1)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return paint
