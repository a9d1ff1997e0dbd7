"""Two collectives of a rank in the wrong order: the first is held back until the second has overtaken it.

Only collectives that their caller does not wait for at once can change places. One that is held back and not
overtaken in time is let go, late but in order; that does not count as the fault, which waits for the next pair.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distrain.core.protocols import CollectiveCall

from ..live import Live
from .intercept import Issue, tensors_in


@dataclass(slots=True, eq=False)
class _Held:
    """A collective that has not been issued, and the future for which its caller waits."""

    call: CollectiveCall
    arguments: Sequence[Any]
    issue: Issue
    done: "torch.futures.Future[list[Tensor]]" = field(default_factory=torch.futures.Future)

    def release(self) -> None:
        """Issue it, and wait until it is over."""
        try:
            result = self.issue(*self.arguments)
            work = result[1] if isinstance(result, tuple) else result
            dist.Work.unbox(work).wait()
            self.done.set_result(tensors_in(self.arguments[0]))
        except RuntimeError as error:
            self.done.set_exception(error)  # type: ignore[arg-type]  # torch's stub asks for a result


class Reorder:
    """``Around`` for one fault."""

    def __init__(self, live: Live, stack: ExitStack) -> None:
        self._live = live
        self._lock = threading.Lock()
        self._held: _Held | None = None
        self._is_over = threading.Event()
        self._threads: list[threading.Thread] = []
        stack.callback(self._close)

    def __call__(self, call: CollectiveCall, arguments: Sequence[Any], issue: Issue) -> Any:
        """Hold ``call`` back, let it overtake the one that is held, or do neither."""
        held = self._take(group=call.group)
        if held:
            result = issue(*arguments)
            self._live.fired(
                collective=held.call.name, group=call.group, sequences=[call.sequence, held.call.sequence]
            )
            self._start(held.release)
            return result
        wanted = self._live.param("collective") in ("any", call.name)
        if not wanted or not issue.is_async(arguments) or not self._live.due(step=self._live.here.step):
            return issue(*arguments)
        with self._lock:
            mine = self._held = _Held(call, arguments, issue)
        self._start(lambda: self._lose_patience(mine))
        return issue.result(arguments, done=mine.done)

    def _take(self, *, group: str | None = None, only: _Held | None = None) -> _Held | None:
        """What is held, if it is of this group, or this one; it is not held any more."""
        with self._lock:
            held = self._held
            if held is None or (only is not held if only else held.call.group != group):
                return None
            self._held = None
            return held

    def _lose_patience(self, mine: _Held) -> None:
        self._is_over.wait(self._live.param("hold_s"))
        if self._take(only=mine):
            self._live.missed()
            mine.release()

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name="distrain-reorder", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _close(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()
