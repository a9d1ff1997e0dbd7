"""Storage that is slow, full, broken, or that does not hold what was written: in the process that writes or reads.

Everything happens at failpoints that the room of checkpoints passes before it asks the system for something. What
was torn or corrupted is changed in the file itself, after all of it has been written and before it is made durable,
so that whoever wrote it believes in it.
"""

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from distrain.core.vocabulary import FaultKind

from ..kinds import OPERATIONS
from ..live import Here, Live
from ..points import Points

_STEP = re.compile(r"step-(\d+)")
BLOB = "checkpoint.fsync"
"""passed when all of a writer's extents have been written: the context has the file's path"""
WRITE_BYTES = 8 << 20
"""of which one write tears: less than an extent"""

Effect = Callable[[Live, Mapping[str, Any]], object]


def install(faults: Sequence[Live], here: Here, points: Points, stack: ExitStack) -> None:
    """Put each fault before the operation that it spoils."""
    effects: dict[FaultKind, Effect] = {
        FaultKind.CKPT_SLOW: _slow,
        FaultKind.CKPT_ENOSPC: partial(_fail, number=errno.ENOSPC),
        FaultKind.CKPT_EIO: partial(_fail, number=errno.EIO),
        FaultKind.CKPT_TORN: _tear,
        FaultKind.CKPT_CORRUPT: _corrupt,
    }
    for live in faults:
        is_any = "operation" in live.spec.params
        point = OPERATIONS[live.param("operation")] if is_any else BLOB
        points.on(point, partial(_passed, live, effects[live.fault.kind]))


def _passed(live: Live, effect: Effect, context: Mapping[str, Any]) -> None:
    path = str(context.get("path") or context.get("new") or "")
    if live.due(step=step_of(path)):
        effect(live, {**context, "path": path, "step": step_of(path)})


def step_of(path: str) -> int | None:
    """The step of the checkpoint to which a file belongs."""
    found = _STEP.search(path)
    return int(found[1]) if found else None


def _slow(live: Live, context: Mapping[str, Any]) -> None:
    live.fired(step=context["step"], path=context["path"])
    time.sleep(live.param("delay_s"))


def _fail(live: Live, context: Mapping[str, Any], *, number: int) -> None:
    live.fired(step=context["step"], path=context["path"])
    raise OSError(number, os.strerror(number))


def _tear(live: Live, context: Mapping[str, Any]) -> None:
    """The first write has only half arrived; by default the process dies with it, as it does when power fails."""
    path, is_fatal = context["path"], live.param("crash")
    with open(path, "r+b", buffering=0) as file:
        end = min(os.lseek(file.fileno(), 0, os.SEEK_HOLE), WRITE_BYTES)
        half = end // 2
        live.fired(step=context["step"], path=path, zeros_from=half, zeros_to=end, crash=is_fatal)
        os.pwrite(file.fileno(), bytes(end - half), half)
    if is_fatal:
        os.kill(os.getpid(), signal.SIGKILL)


def _corrupt(live: Live, context: Mapping[str, Any]) -> None:
    """One bit of a block has changed."""
    path, dice = context["path"], live.dice
    byte, bit = dice.randrange(os.path.getsize(path)), dice.randrange(8)
    live.fired(step=context["step"], path=path, byte=byte, bit=bit)
    with open(path, "r+b") as file:
        file.seek(byte)
        (old,) = file.read(1)
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))
