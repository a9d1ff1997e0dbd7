"""Faults that come from outside, as their victim sees them: it asks for them when their moment has come.

The injector times what depends on seconds alone. What depends on steps or collectives is asked for by the rank, which
waits for the answer and is hit while it waits; where a rank is not the victim it asks on behalf of its node.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from distrain.core.vocabulary import FaultKind

from ..live import Here, Live
from ..plan import BETWEEN
from ..points import Points
from .steps import place

PIECE_BYTES = 4 << 20


def install(faults: Sequence[Live], here: Here, points: Points, stack: ExitStack) -> None:
    """Put each fault in its place, or tell the injector when it is due."""
    for live in faults:
        if _is_timed(live):
            request = {"do": "inject", "fault": live.number, "after_s": live.fault.at.after_s or 0.0}
            assert here.control is not None
            here.control.tell(**request)
        else:
            place(live, points, _ask)


def _is_timed(live: Live) -> bool:
    at, target = live.fault.at, live.fault.target
    is_anywhere = target.where == BETWEEN and not target.phase and live.fault.kind is not FaultKind.PROC_OOM
    return is_anywhere and at.step is None and at.op is None


def _ask(live: Live, context: Mapping[str, Any]) -> None:
    control = live.here.control
    assert control is not None
    answer = control.ask(do="inject", fault=live.number, step=context["step"])
    if not answer:
        live.failed("the injector is gone")
    elif answer.get("allocate"):
        _allocate()


def _allocate() -> None:
    """Ask for memory, and use it, until the kernel ends this process."""
    hoard = []
    while True:
        hoard.append(bytearray(b"\1") * PIECE_BYTES)
