"""One keeper a node, for ranks that save snapshots: started when the first of them asks for it.

The agent holds the sockets at which the keeper is found, by this node's ranks and on node 0 also by the keepers of
other nodes. A connection to one of them starts the keeper, which inherits them; a job that never saves pays nothing.
If the keeper dies, the next connection starts another one at the same place. The keeper serves until the agent lets
go of a pipe, by leaving or by dying, and then finishes what it is writing.
"""

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from distrain.core.errors import ConfigError
from distrain.core.sidecar_home import COORDINATOR, JOB, JOB_KEY, Home

from .job import Seat
from .signals import Signals

LAST_WRITES_S = 120.0
"""how long the job's end waits for the keeper to finish writing"""
QUIET_S = 1.0
"""from when on it says so"""
PAUSES_S = (0.1, 5.0)
"""between a keeper's end and the start of another: at first, and at most"""


def with_keeper(environ: Mapping[str, str], seat: Seat) -> Mapping[str, str]:
    """``environ`` with all that ranks and keepers need in order to find each other.

    A key that it holds already stands: where the network between the nodes is not to be trusted with one, the user
    gives every node the same.
    """
    kept = {key: value for key, value in environ.items() if key != COORDINATOR}
    ours = {JOB: seat.job, JOB_KEY: environ.get(JOB_KEY) or seat.job_key}
    return {**kept, **ours, **({COORDINATOR: seat.coordinator} if seat.coordinator else {})}


@contextmanager
def keeper_at(
    environ: Mapping[str, str],
    seat: Seat,
    *,
    members: socket.socket | None,
    arrived: Signals,
    is_stranded: Callable[[], bool],
) -> Iterator[None]:
    """Start this node's keeper when it is asked for; at the end wait for its last writes, or for a signal.

    ``environ`` is what ``with_keeper`` gives; ``members`` is where node 0's keeper listens to those of other nodes.
    ``is_stranded`` is asked at the end: a keeper without node 0, for which it would wait, is told not to.
    """
    with ExitStack() as stack:
        if members:
            stack.enter_context(members)
        try:
            home = Home(environ[JOB], node_rank=seat.node_rank, environ=environ)
            with home.locked():
                listener = stack.enter_context(home.listen())
        except (ConfigError, OSError) as error:
            _say(f"ranks will have no keeper: {str(error).splitlines()[0].removeprefix('error: ')}")
            yield
            return
        stack.callback(home.remove)
        starter = _Starter(
            home, [listener, *([members] if members else [])], with_members=members is not None
        )
        stack.callback(starter.close)
        try:
            yield
        finally:
            starter.finish(arrived, is_stranded=is_stranded())


class _Starter:
    """Waits for connections in a thread, and starts keepers."""

    def __init__(self, home: Home, sockets: Sequence[socket.socket], *, with_members: bool) -> None:
        self._home, self._sockets, self._with_members = home, sockets, with_members
        self._lease_end, self._lease = os.pipe()
        self._wake_end, self._wake = os.pipe()
        self._keeper: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="distrain-keeper-starter", daemon=True)
        self._thread.start()

    def finish(self, arrived: Signals, *, is_stranded: bool) -> None:
        """Start no more; wait until the keeper has written everything, unless a signal comes."""
        os.close(self._wake)
        self._thread.join()
        os.close(self._lease)
        if self._keeper is None or self._keeper.poll() is not None:
            return
        if is_stranded:
            self._keeper.terminate()
        pidfd = os.pidfd_open(self._keeper.pid)
        poll = select.poll()
        for fd in (pidfd, arrived.fileno()):
            poll.register(fd, select.POLLIN)
        try:
            if not poll.poll(1000 * QUIET_S):
                _say("the last checkpoint is still being written")
                poll.poll(1000 * LAST_WRITES_S)
            if self._keeper.poll() is None:
                _say("the keeper goes on writing by itself")
                self._keeper.returncode = 0  # not ours to wait for any more
        finally:
            os.close(pidfd)

    def close(self) -> None:
        """Close what is left of the pipes."""
        for fd in (self._lease_end, self._wake_end):
            os.close(fd)

    def _run(self) -> None:
        pause_s = PAUSES_S[0]
        while self._is_asked_for():
            began = time.monotonic()
            self._keeper = self._home.start(
                self._sockets[0], tcp=self._sockets[1] if self._with_members else None, lease=self._lease_end
            )
            if self._ends_first(self._keeper):
                pause_s = PAUSES_S[0] if time.monotonic() - began > 10 * PAUSES_S[1] else pause_s
                if _waits([self._wake_end], timeout_s=pause_s):
                    return
                pause_s = min(2 * pause_s, PAUSES_S[1])
            else:
                return

    def _is_asked_for(self) -> bool:
        """Wait for a connection; False once there is nothing to wait for any more."""
        ready = _waits([self._wake_end, *(each.fileno() for each in self._sockets)])
        return self._wake_end not in ready

    def _ends_first(self, keeper: "subprocess.Popen[bytes]") -> bool:
        """Wait for the keeper's end; False if the job's came first."""
        pidfd = os.pidfd_open(keeper.pid)
        try:
            if self._wake_end in _waits([self._wake_end, pidfd]):
                return False
        finally:
            os.close(pidfd)
        code = keeper.wait()
        _say(f"the keeper ended: {code}; another one starts when it is needed")
        return True


def _waits(fds: Sequence[int], *, timeout_s: float | None = None) -> set[int]:
    """The descriptors that are readable, once one is."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(None if timeout_s is None else 1000 * timeout_s)}


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"[launch] {text}", file=sys.stderr, flush=True)
