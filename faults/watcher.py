"""Ends a drill's job, should the drill itself be killed: nobody else would, and a frozen rank would stay frozen.

All processes of a job inherit a mark in their environment, however far they detach themselves. A process beside the
drill waits for the end of a pipe; if the drill has not said before that all is well, for it was killed or interrupted,
whatever has the mark is ended, and the control groups of the dead are taken away.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from .inject.cgroups import sweep

MARK = "DISTRAIN_DRILL"
WELL = b"well\n"
GRACE_S, PERSISTENCE_S = 10.0, 10.0
"""between SIGTERM and SIGKILL, and from then until it gives up"""
LOOK_S = 0.05


class Watcher:
    """The drill's end, as a context: start before the job, with ``variables`` in the job's environment."""

    def __init__(self) -> None:
        self.variables = {MARK: secrets.token_hex(8)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distrain.faults.watcher", self.variables[MARK]],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        if kind is None:  # whoever cleans up after an error, a second Ctrl-C may have kept from it
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(WELL)
        self._process.stdin.close()
        self._process.wait()


def end(mark: str) -> None:
    """End all processes that have the mark: politely first."""
    started = time.monotonic()
    told: set[int] = set()
    while (left := _marked(mark)) and (waited_s := time.monotonic() - started) < GRACE_S + PERSISTENCE_S:
        sweep()
        for pid in left:
            if pid not in told or waited_s > GRACE_S:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if pid not in told else signal.SIGKILL)
                    os.kill(pid, signal.SIGCONT)
        told |= left
        time.sleep(LOOK_S)


def _marked(mark: str) -> set[int]:
    wanted = f"{MARK}={mark}".encode()
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.add(int(entry.name))
    return found


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    if sys.stdin.buffer.read() != WELL:
        end(sys.argv[1])
        sweep()
