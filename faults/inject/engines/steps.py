"""Where in a step a fault happens: at a point that the trainer passes, or inside one of its collectives.

A trainer passes ``train.step`` (``step``, from 1) when a step begins, ``train.data`` (``step``, ``inputs``: integer
tensors) when this rank's share of a batch has been read, and ``train.gradients`` (``step``, ``gradients``: tensors)
when they are complete and the optimizer has not used them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..kinds import PHASES
from ..live import Live
from ..plan import IN_COLLECTIVE
from ..points import Points

IN_COLLECTIVE_POINT = "faults.in_collective"
"""passed by the interceptor of collectives (``collectives``) after one has been issued"""

Effect = Callable[[Live, Mapping[str, Any]], object]


def place(live: Live, points: Points, effect: Effect) -> None:
    """Have ``effect`` happen when ``live`` is due at its place."""
    is_inside = live.fault.target.where == IN_COLLECTIVE
    phase = live.fault.target.phase or next(iter(live.spec.phases), "start")

    def passed(context: Mapping[str, Any]) -> None:
        step = context.get("step", live.here.step)
        if live.due(step=step):
            effect(live, {**context, "step": step})

    points.on(IN_COLLECTIVE_POINT if is_inside else PHASES[phase], passed)
