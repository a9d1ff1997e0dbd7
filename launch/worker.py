"""One rank's process: started tied to the agent, in a session of its own, watched without polling.

The session is what makes "the rank is gone" true: grandchildren (data loader workers, the program under a shell
script) share it, and signals reach them all. The process stays a zombie until ``close``, so its number cannot be
given to a stranger while signals may still be sent to it.
"""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from .job import WorkerSpec
from .tether import tethered

KILL_WAIT_S = 1.0


class Worker:
    """A running or ended rank. ``exit_code`` is None while it runs; -N means killed by signal N."""

    def __init__(
        self, spec: WorkerSpec, command: Sequence[str], *, env: Mapping[str, str], own_stdout: bool
    ) -> None:
        self.spec = spec
        self.exit_code: int | None = None
        self.exited_at = 0.0
        self._process = subprocess.Popen(
            tethered(command),
            env=env,
            stdout=None if own_stdout else subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    @property
    def pipes(self) -> tuple[IO[bytes] | None, IO[bytes] | None]:
        """Its stdout (None if it has ours) and stderr."""
        return self._process.stdout, self._process.stderr

    def look(self, now: float) -> None:
        """Take note if it has ended."""
        if self.exit_code is None:
            end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None:
                killed = end.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                self.exit_code, self.exited_at = (-end.si_status if killed else end.si_status), now

    def signal(self, signum: int) -> None:
        """Send ``signum`` to the process, if it still runs."""
        if self.exit_code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def close(self) -> None:
        """Let the process go; one that still runs is killed."""
        if self.exit_code is None:
            self.signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that SIGKILL does not end hangs in the kernel
            self._process.wait(timeout=KILL_WAIT_S)
        os.close(self.pidfd)
        for pipe in self.pipes:
            if pipe is not None:
                pipe.close()
