"""A rank's input that comes too late, or is not what the others believe."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from distrain.core.vocabulary import FaultKind

from ..live import Here, Live
from ..points import Points
from .steps import Effect, place


def install(faults: Sequence[Live], here: Here, points: Points, stack: ExitStack) -> None:
    """Put each fault where the rank's share of a batch has been read."""
    effects: dict[FaultKind, Effect] = {FaultKind.DATA_STALL: _stall, FaultKind.DATA_CORRUPT: _corrupt}
    for live in faults:
        place(live, points, effects[live.fault.kind])


def _stall(live: Live, context: Mapping[str, Any]) -> None:
    live.fired(step=context["step"])
    time.sleep(live.fault.duration_s)


def _corrupt(live: Live, context: Mapping[str, Any]) -> None:
    """Reverse the tokens of each micro-batch: every id is one that the model knows, and all are wrong."""
    live.fired(step=context["step"])
    for tensor in context["inputs"]:
        tensor.copy_(tensor.flatten().flip(0).view(tensor.shape))
