"""A rank whose wall clock is wrong, as that of a node whose time nobody keeps.

The kernel has one time of day for all processes, so the process is deceived instead: a library that stands before
libc (``clock.cpp``) adds an offset to what it is told. ``LD_PRELOAD`` puts it into every process of a job whose plan
has such a fault; it does nothing until the rank that is to be hit says so, and to no other process. Python, torch and
gloo all ask libc; what the kernel stamps by itself, as files, keeps the right time.
"""

import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distrain.core import native
from distrain.core.errors import ConfigError, MissingDependencyError

from ..live import Here, Live
from ..points import Points
from .steps import place

PRELOAD = "LD_PRELOAD"
_SOURCE = Path(__file__).with_name("clock.cpp")
_FLAGS = ("-fno-exceptions", "-Wl,--as-needed", "-ldl")


def build() -> Path:
    """The library, compiled unless it is there.

    Raises:
        MissingDependencyError: it cannot be compiled, or lies where ``LD_PRELOAD`` cannot name it.
    """
    path = native.find("clock", [_SOURCE], build=True, flags=_FLAGS).absolute()
    if ":" in str(path) or any(map(str.isspace, str(path))):
        raise MissingDependencyError(
            "the clock of a job cannot be shifted",
            got=f"{path}, which {PRELOAD} would take apart",
            hint="name a folder without spaces and colons: DISTRAIN_CACHE_DIR=/var/tmp/distrain",
        )
    return path


def preload(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What has the library loaded into processes with this environment, before what they preload anyway."""
    others = environ.get(PRELOAD, "")
    return {PRELOAD: ":".join(filter(None, (str(build()), others)))}


def install(faults: Sequence[Live], here: Here, points: Points, stack: ExitStack) -> None:
    """Put each fault in its place; the clock is right again in the end. Raises ConfigError without the library."""
    if not hasattr(ctypes.CDLL(None), "distrain_skew"):
        raise ConfigError(
            "the clock of this process cannot be shifted",
            got=f"{PRELOAD} = {os.environ.get(PRELOAD, '')!r}",
            hint="start the job with the variables of `Injector(plan, folder)`, and let it keep them",
        )
    stack.callback(_shift, 0.0, lasting_s=0.0)
    for live in faults:
        place(live, points, _skew)


def _skew(live: Live, context: Mapping[str, Any]) -> None:
    live.fired(step=context["step"], offset_s=live.param("offset_s"))
    _shift(live.param("offset_s"), lasting_s=live.fault.duration_s)


def _shift(offset_s: float, *, lasting_s: float) -> None:
    """Put the wall clock of this process forward, for a time or (0) for good."""
    until_ns = time.monotonic_ns() + round(lasting_s * 1e9) if lasting_s else 0
    shift = ctypes.CDLL(None).distrain_skew
    shift.argtypes, shift.restype = (ctypes.c_int64, ctypes.c_int64), None
    shift(round(offset_s * 1e9), until_ns)
