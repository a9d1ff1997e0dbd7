"""The keeper: one process a node that holds the snapshots of its ranks and sees them to disk.

One event loop, no state that is not in it. Trainers come over a unix socket (``Reception``) into the ``Circle`` of
what they save; there each is served by a ``Session``, and what they do goes to the ``Member``. Node 0's keeper has the
``Coordinator``; those of other nodes keep up a connection to it.

It ends when the job does: when the launcher that leased it is gone, or all trainers have said good-bye, and nothing is
left to write; or when nobody has been there for a while. Losing a trainer ends nothing.
"""

import asyncio
import contextlib
import os
import signal
import socket
import time
from dataclasses import dataclass

from distrain.checkpoint.keeper_config import KeeperConfig
from distrain.core.sidecar_home import Home
from distrain.core.wire import Frame

from .circle import Circle, Node
from .coordinator import Coordinator
from .links import MembersServer
from .reception import Answer, Hello, Reception, job_of
from .session import STRANDED_S, Refusal

LOOK_S = 0.1
"""between two looks at whether it is time to end"""
FIRST_S = 60.0
"""how long a keeper waits for its first trainer"""
HANG_S = 600.0
"""how long a keeper that should end waits for a disk that does not answer"""
MAX_CIRCLES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a keeper was started."""

    job: str
    node_rank: int
    listen_fd: int
    tcp_fd: int | None = None
    lease_fd: int | None = None


class Keeper:
    """The whole process; ``run`` it in an event loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._home = Home(options.job, node_rank=options.node_rank)
        self._node = Node(
            options.node_rank,
            self._home,
            self._home.key(),
            expect_members=self._expect_members,
            disconnect_members=self._disconnect_members,
        )
        self._circles: dict[str, Circle] = {}
        self._members: MembersServer | None = None
        self._lease_is_over = False
        self._is_stopping = False

    async def run(self) -> None:
        """Serve until the job is over."""
        loop = asyncio.get_running_loop()
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(ignored, signal.SIG_IGN)
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        if self._options.lease_fd is not None:
            loop.add_reader(self._options.lease_fd, self._lease_ends)
        if self._options.tcp_fd is not None:
            self._expect_members()
        listener = socket.socket(fileno=self._options.listen_fd)
        reception = Reception(listener, key=self._node.key, welcome=self._welcome)
        try:
            await self._until_over(reception)
        finally:
            reception.close()
            for circle in self._circles.values():
                circle.close()
            if self._options.lease_fd is None or self._lease_is_over:
                with contextlib.suppress(OSError):
                    self._home.remove()

    # -- the end

    def _stop(self) -> None:
        self._is_stopping = True

    def _lease_ends(self) -> None:
        if self._options.lease_fd is not None:
            asyncio.get_running_loop().remove_reader(self._options.lease_fd)
        self._lease_is_over = True

    async def _until_over(self, reception: Reception) -> None:
        wanted_since = started = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            now, circles = time.monotonic(), self._circles.values()
            if self._options.lease_fd is not None:
                is_over = self._lease_is_over
                if not reception.busy:
                    self._close_what_is_done()
            elif circles:
                is_over = all(each.is_done or each.is_idle for each in circles)
            else:
                is_over = now - started > FIRST_S
            is_present = reception.busy or any(each.is_present for each in circles)
            if is_present or not (is_over or self._is_stopping):
                wanted_since = now
            elif now - wanted_since > HANG_S or all(
                self._may_end(each, now - wanted_since) for each in circles
            ):
                return

    def _may_end(self, circle: Circle, waited_s: float) -> bool:
        """Whether neither this node's disks nor other nodes need the circle any more."""
        if circle.busy:
            return False
        if circle.is_stranded and not self._is_stopping and waited_s < STRANDED_S:
            return False
        return not circle.is_needed_elsewhere or circle.is_idle

    def _close_what_is_done(self) -> None:
        """A long job may save in many places one after the other: give their memory back."""
        for job, circle in list(self._circles.items()):
            if (
                circle.is_done
                and not circle.is_needed_elsewhere
                and not circle.busy
                and not circle.is_stranded
            ):
                circle.close()
                del self._circles[job]

    # -- trainers and other nodes

    async def _welcome(self, frame: Frame, fd: int) -> Answer:
        """Whoever has come in: a trainer, or a reader of memory."""
        try:
            circle = self._circle(job_of(frame))
            if frame.header.get("do") == "fetch":
                return circle.fetch(str(frame.header.get("arena")))
            if frame.header.get("do") != "hello":
                raise Refusal("this is not how to begin", got=repr(frame.header.get("do"))[:80])
            hello = Hello.read(frame)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        return await circle.welcome(hello, fd)

    def _circle(self, job: str) -> Circle:
        if job not in self._circles and len(self._circles) >= MAX_CIRCLES:
            raise Refusal("this keeper has too many jobs", got=str(MAX_CIRCLES))
        return self._circles.setdefault(job, Circle(job, node=self._node))

    def _expect_members(self) -> None:
        """Take connections of other nodes' keepers, where the environment says or at a port that is published."""
        if self._members:
            return
        if self._options.tcp_fd is not None:
            tcp = socket.socket(fileno=self._options.tcp_fd)
        else:
            host, _, port = self._home.coordinator_to_be().rpartition(":")
            tcp = socket.create_server((host, int(port)))
            if port == "0":
                self._home.publish_coordinator(f"{host}:{tcp.getsockname()[1]}")
        self._members = MembersServer(tcp, key=self._node.key, coordinator=self._coordinator)

    def _disconnect_members(self, job: str) -> None:
        if self._members:
            self._members.disconnect(job)

    def _coordinator(self, job: str, config: KeeperConfig) -> Coordinator:
        """The coordinator for a member; raises Refusal."""
        if job not in self._circles:
            raise Refusal("no rank of node 0 has come yet")
        return self._circles[job].coordinator(config)
