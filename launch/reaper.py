"""Kills what the ranks started, and removes what the agent made, should it die without having done so itself.

The kernel kills a rank when its agent dies (see tether), but not the rank's own children: a program under a shell
script would run on and hold its GPU. So the agent names each rank's session to this process through a pipe. When the
pipe ends, however the agent ended, whatever still lives in those sessions is killed. If the agent has not said that
all is well, its folder and its keeper's sockets are removed too.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from distrain.core.errors import ConfigError
from distrain.core.sidecar_home import Home

from .job import Seat
from .sessions import survivors

PERSISTENCE_S = 5.0
WELL = b"well\n"


class Reaper:
    """The agent's end: start before the ranks, ``watch`` each, ``close`` when they are gone."""

    def __init__(self, seat: Seat, *, folder: Path | None) -> None:
        """``folder`` is one that nobody wants to keep."""
        left = [str(folder or ""), seat.job, str(seat.node_rank)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distrain.launch.reaper", *left],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )

    def watch(self, session: int) -> None:
        """Name a rank's session; without a reaper to hear it the job goes on."""
        if self._process.stdin:
            with suppress(BrokenPipeError):
                self._process.stdin.write(b"%d\n" % session)

    def close(self) -> None:
        """End the process; it takes with it what is left of the sessions."""
        if self._process.stdin:
            with suppress(BrokenPipeError):
                self._process.stdin.write(WELL)
            self._process.stdin.close()
        self._process.wait()


def reap(sessions: Iterable[int]) -> None:
    """Kill every process of ``sessions``, those included that are born meanwhile."""
    named = set(sessions)
    deadline = time.monotonic() + PERSISTENCE_S
    while (left := survivors(named)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def remove(folder: str, *, job: str, node_rank: int) -> None:
    """Remove what an agent has made, as far as it is there; a keeper that still writes needs none of it."""
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(ConfigError, OSError):
        Home(job, node_rank=node_rank).remove()


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    lines = list(sys.stdin.buffer)
    reap(int(line) for line in lines if line != WELL)
    if WELL not in lines:
        remove(sys.argv[1], job=sys.argv[2], node_rank=int(sys.argv[3]))
