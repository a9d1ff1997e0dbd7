"""What a process can do to itself: leave, fail, or keep all of its Python threads waiting."""

import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from distrain.core.vocabulary import FaultKind

from ..live import Here, Live
from ..points import Points
from .steps import place


class InjectedFault(RuntimeError):
    """What ``proc.exception`` raises in the trainer."""


def install(faults: Sequence[Live], here: Here, points: Points, stack: ExitStack) -> None:
    """Put each fault in its place."""
    effects = {
        FaultKind.PROC_EXIT: _exit,
        FaultKind.PROC_EXCEPTION: _raise,
        FaultKind.PROC_GIL_HOG: _hog,
    }
    for live in faults:
        place(live, points, effects[live.fault.kind])


def _exit(live: Live, context: Mapping[str, Any]) -> None:
    """Leave as a library does that calls exit(): nothing is flushed, nobody is told."""
    code = live.param("code")
    live.fired(step=context["step"], code=code)
    os._exit(code)


def _raise(live: Live, context: Mapping[str, Any]) -> None:
    live.fired(step=context["step"])
    raise InjectedFault(live.param("message"))


def _hog(live: Live, context: Mapping[str, Any]) -> None:
    """Sleep in C without giving the interpreter back, as an extension does that forgets to."""
    live.fired(step=context["step"])
    deadline = time.monotonic() + live.fault.duration_s
    usleep = ctypes.PyDLL(None).usleep  # PyDLL, unlike CDLL, keeps the interpreter lock
    while (left := deadline - time.monotonic()) > 0:  # a signal ends usleep early
        usleep(min(round(left * 1e6), 2**31))
