"""The keeper: one process a node that holds the snapshots of its ranks and sees them to disk.

One event loop, no state that is not in it. Trainers come over a unix socket (``Reception``), get memory (``Places``)
and are served by a ``Session`` each; what they do goes to the ``Member``. Node 0's keeper has the ``Coordinator``; on
other nodes a connection to it is kept up.

It ends when the job does: when the launcher that leased it is gone, or all trainers have said good-bye, and nothing is
left to write; or when nobody has been there for a while. Losing a trainer ends nothing.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.checkpoint.keeper_config import KeeperConfig
from distrain.core.events import EventLog, JsonlSink
from distrain.core.sidecar_home import Home
from distrain.core.wire import Frame
from distrain.core.wire_ends import AsyncEnd

from .coordinator import Coordinator
from .lanes import Lane
from .links import LocalLink, MembersServer, RemoteLink
from .member import Member
from .places import Places
from .reception import Answer, Hello, Reception
from .session import Refusal, Session
from .shelf import Shelf

LOOK_S = 0.1
"""between two looks at whether it is time to end"""
TURN_S = 10.0
"""how long a trainer waits for the one whose place it takes"""
FIRST_S = 60.0
"""how long a keeper waits for its first trainer"""
HANG_S = 600.0
"""how long a keeper that should end waits for a disk that does not answer"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a keeper was started."""

    job: str
    node_rank: int
    listen_fd: int
    tcp_fd: int | None = None
    lease_fd: int | None = None


@dataclass(slots=True)
class Team:
    """What belongs to one configuration of the job."""

    config: KeeperConfig
    lanes: list[Lane]
    member: Member
    coordinator: Coordinator | None = None
    link: RemoteLink | None = None

    @property
    def busy(self) -> bool:
        """Whether anything is left to write or to agree on."""
        return self.member.busy or bool(self.coordinator and self.coordinator.busy)

    def close(self) -> None:
        """Leave the others and let the threads end."""
        if self.link:
            self.link.close()
        if self.coordinator:
            self.coordinator.close()
        for lane in self.lanes:
            lane.close()


class Keeper:
    """The whole process; ``run`` it in an event loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._home = Home(options.job, node_rank=options.node_rank)
        self._key = self._home.key()
        self._shelf = Shelf()
        self._places = Places(self._shelf, job=options.job, say=self._say)
        self._team: Team | None = None
        self._members: MembersServer | None = None
        self._reception: Reception | None = None
        self._sessions: set[Session] = set()
        self._coming: set[tuple[int, int]] = set()
        self._missing: set[tuple[int, int]] = set()
        """ranks, with their world size, that left without a word"""
        self._events: EventLog | None = None
        self._lease_is_over = False
        self._is_stopping = False
        self._idle_since = time.monotonic()

    async def run(self) -> None:
        """Serve until the job is over."""
        loop = asyncio.get_running_loop()
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(ignored, signal.SIG_IGN)
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        if self._options.lease_fd is not None:
            loop.add_reader(self._options.lease_fd, self._lease_ends)
        if self._options.tcp_fd is not None:
            self._listen_to_members()
        listener = socket.socket(fileno=self._options.listen_fd)
        self._reception = Reception(listener, key=self._key, welcome=self._welcome)
        try:
            await self._until_over()
        finally:
            self._reception.close()
            self._places.close()
            if self._team:
                self._team.close()
            with contextlib.suppress(OSError):
                self._home.remove()
            if self._events:
                self._events.close()

    # -- the end

    def _stop(self) -> None:
        self._is_stopping = True

    def _lease_ends(self) -> None:
        if self._options.lease_fd is not None:
            asyncio.get_running_loop().remove_reader(self._options.lease_fd)
        self._lease_is_over = True

    async def _until_over(self) -> None:
        wanted_since: float | None = None
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if self._sessions or (self._reception and self._reception.busy):
                self._idle_since, wanted_since = now, None
                continue
            idle_limit_s = self._team.config.idle_limit_s if self._team else FIRST_S
            is_idle = now - self._idle_since > idle_limit_s
            if not self._wants_to_end and not (is_idle and self._options.lease_fd is None):
                continue
            if not self._team or (not self._team.busy and (self._is_free_to_go or is_idle)):
                return
            wanted_since = wanted_since or now
            if now - wanted_since > HANG_S:
                self._say(
                    "error", "hang", f"the keeper ends, though something has not answered for {HANG_S:g} s"
                )
                return

    @property
    def _wants_to_end(self) -> bool:
        if self._options.lease_fd is not None:
            return self._is_stopping or self._lease_is_over
        return self._is_stopping or (self._team is not None and not self._missing)

    @property
    def _is_free_to_go(self) -> bool:
        """Whether no other node needs this one, and this one needs none."""
        team = self._team
        if team is None:
            return True
        needs_me = team.coordinator is not None and team.coordinator.num_members > 1
        return not needs_me and (self._is_stopping or not team.member.is_stranded)

    # -- trainers

    async def _welcome(self, frame: Frame, fd: int) -> Answer:
        """Whoever has come in: a trainer, or a reader of memory."""
        if frame.header.get("do") == "fetch":
            return self._places.fetch(str(frame.header.get("arena")))
        try:
            hello = Hello.read(frame, job=self._options.job)
            await self._make_room(hello)
            team = self._team_for(hello)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        self._coming.add(hello.who)
        try:
            slots = await self._places.place(hello, fd)
        finally:
            self._coming.discard(hello.who)
        allocated = self._places.allocate(slots)
        session = Session(slots, member=team.member, allocated=allocated, status=self._status)
        self._sessions.add(session)
        self._missing = {who for who in self._missing if who[0] == hello.world_size} - {hello.who}
        team.member.arrive(slots)
        return Answer(
            Frame({"first_slot": slots.arena.shape.first_slot}),
            fd=-1 if hello.returns else os.dup(slots.arena.fd),
            serve=lambda end: self._serve(session, end),
            leave=lambda: self._leave(session),
        )

    async def _make_room(self, hello: Hello) -> None:
        """Wait for those in whose place this trainer comes, who may be ending at the moment."""
        deadline = time.monotonic() + TURN_S
        while reason := self._conflict(hello):
            if time.monotonic() > deadline:
                raise Refusal(reason)
            await asyncio.sleep(0.02)

    def _conflict(self, hello: Hello) -> str:
        """Why this trainer cannot be taken at the moment; empty if it can."""
        present = {(each.slots.world_size, each.slots.rank) for each in self._sessions} | self._coming
        if hello.who in present:
            return f"rank {hello.rank} is still there"
        if others := {world for world, _ in present} - {hello.world_size}:
            return f"ranks of a job of world size {min(others)} are still there"
        if self._team and self._team.config != hello.config and (present or self._team.busy):
            return "the keeper works with another configuration"
        return ""

    async def _serve(self, session: Session, end: AsyncEnd) -> None:
        try:
            await session.serve(end)
        finally:
            self._leave(session)

    def _leave(self, session: Session) -> None:
        if session not in self._sessions:
            return
        self._sessions.discard(session)
        self._idle_since = time.monotonic()
        session.leave()
        if not session.said_bye:
            self._missing.add((session.slots.world_size, session.slots.rank))
            self._say("warning", "trainer_gone", f"rank {session.slots.rank} is gone without a word")

    # -- the team

    def _team_for(self, hello: Hello) -> Team:
        """The team of this configuration: that of the first trainer, or of the first after all others have left."""
        config = hello.config
        if self._team and self._team.config == config:
            return self._team
        if self._team:
            self._team.close()
        if self._members:
            self._members.disconnect()
        self._open_events(config)
        job, node_rank, mesh = self._options.job, self._options.node_rank, config.mesh
        lanes = [
            Lane(index, tier, node_rank=node_rank, num_threads=1 if index else 2)
            for index, tier in enumerate(config.tiers)
        ]
        member = Member(job=job, mesh=mesh, lanes=lanes, shelf=self._shelf, say=self._say)
        team = self._team = Team(config, lanes, member)
        if node_rank == 0:
            team.coordinator = Coordinator(config, lanes=lanes, say=self._say)
            LocalLink(member, team.coordinator)
            if hello.num_nodes > 1:
                self._listen_to_members()
        else:
            team.link = RemoteLink(member, home=self._home, key=self._key, config=config)
        return team

    def _listen_to_members(self) -> None:
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
        self._members = MembersServer(tcp, key=self._key, coordinator=self._coordinator_for)

    def _coordinator_for(self, config: KeeperConfig) -> Coordinator:
        """The coordinator for a member with this configuration; raises Refusal."""
        if self._team is None or self._team.coordinator is None:
            raise Refusal("no rank of node 0 has come yet")
        if self._team.config != config:
            raise Refusal("the coordinator works with another configuration")
        return self._team.coordinator

    # -- telling

    def _open_events(self, config: KeeperConfig) -> None:
        if self._events:
            self._events.close()
            self._events = None
        if config.events:
            path = Path(config.events) / f"keeper-{self._options.node_rank}.jsonl"
            try:
                self._events = EventLog([JsonlSink(path)], rank=self._options.node_rank)
            except OSError as error:
                self._say("warning", "no_events", f"events cannot be written to {path}: {error.strerror}")

    def _say(self, level: str, event: str, text: str, **attributes: Any) -> None:
        """Whatever people should know: to the events, and what is not well to the trainers and to stderr."""
        if self._events:
            self._events.event(f"keeper.{event}", level=level, text=text, **attributes)
        if level != "info":
            for session in self._sessions:
                session.notice({"event": event, "level": level, "text": text, **attributes})
            with contextlib.suppress(OSError):
                print(f"{time.strftime('%F %T')} {level}: {text}", file=sys.stderr, flush=True)

    def _status(self) -> dict[str, Any]:
        team = self._team
        return {
            "job": self._options.job,
            "node_rank": self._options.node_rank,
            "pid": os.getpid(),
            "linked": team is not None and team.member.is_linked,
            "tiers": [lane.status() for lane in team.lanes] if team else [],
            "ranks": [slots.status() for slots in self._shelf.ranks],
        }
