"""Ranks that do not say what the others expect: too late, not at all, of another size, or in another order."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from distrain.core.protocols import CollectiveCall
from distrain.core.vocabulary import FaultKind

from ..live import Here, Live
from ..points import Points
from .intercept import Around, Issue, intercept, tensors_in, through
from .reorder import Reorder


def install(faults: Sequence[Live], here: Here, points: Points, stack: ExitStack) -> None:
    """Put the faults around all collectives, those earlier in the plan inside."""
    make: dict[FaultKind, Callable[[Live], Around]] = {
        FaultKind.COMM_DELAY: lambda live: through(_Delay(live)),
        FaultKind.COMM_SKIP: _skip,
        FaultKind.COMM_MISMATCH: _mismatch,
        FaultKind.COMM_REORDER: lambda live: Reorder(live, stack),
    }
    for live in faults:
        intercept(make[live.fault.kind](live), stack)


def _hits(live: Live, call: CollectiveCall) -> bool:
    """Whether the fault acts on this collective, which is then written down."""
    wanted = live.param("collective")
    if wanted not in ("any", call.name) or not live.due(step=live.here.step):
        return False
    live.fired(collective=call.name, group=call.group, sequence=call.sequence)
    return True


class _Delay:
    """A ``CollectiveHook`` that keeps the rank from entering in time."""

    def __init__(self, live: Live) -> None:
        self._live = live

    @contextmanager
    def collective(self, call: CollectiveCall) -> Iterator[None]:
        if _hits(self._live, call):
            time.sleep(self._live.param("delay_s"))
        yield


def _skip(live: Live) -> Around:
    """The rank goes on as if it had taken part."""

    def around(call: CollectiveCall, arguments: Sequence[Any], issue: Issue) -> Any:
        if not _hits(live, call):
            return issue(*arguments)
        done: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        done.set_result(tensors_in(arguments[0]))
        return issue.result(arguments, done=done)

    return around


def _mismatch(live: Live) -> Around:
    """The rank enters with the first half of its tensors."""

    def around(call: CollectiveCall, arguments: Sequence[Any], issue: Issue) -> Any:
        if call.name == "barrier" or not _hits(live, call):
            return issue(*arguments)
        smaller = [_half(argument) if tensors_in(argument) else argument for argument in arguments]
        result = issue(*smaller)
        return (arguments[0], result[1]) if isinstance(result, tuple) else result

    return around


def _half(value: Any) -> Any:
    """Views of the first halves of the tensors in ``value``."""
    if isinstance(value, Tensor):
        return value.view(-1)[: max(1, value.numel() // 2)]
    return [_half(item) for item in value]
