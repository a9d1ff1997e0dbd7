"""Kills what the ranks started, should the agent die without having done so itself.

The kernel kills a rank when its agent dies (see tether), but not the rank's own children: a program under a shell
script would run on and hold its GPU. So the agent names each rank's session to this process through a pipe. When the
pipe ends, however the agent ended, whatever still lives in those sessions is killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress

from .sessions import survivors

PERSISTENCE_S = 5.0


class Reaper:
    """The agent's end: start before the ranks, ``watch`` each, ``close`` when they are gone."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distrain.launch.reaper"],
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


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    reap([int(line) for line in sys.stdin.buffer])
