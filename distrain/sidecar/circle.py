"""All that a keeper holds for one job of saving: the ranks that are there, their memory, and the team that writes it.

A launch may save in several places at once; each is a circle of its own, and none knows of the others.
"""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
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
from .links import LocalLink, RemoteLink
from .member import Member
from .places import Places
from .reception import Answer, Hello
from .session import Refusal, Session
from .shelf import Shelf

TURN_S = 10.0
"""how long a trainer waits for the one whose place it takes"""


@dataclass(frozen=True, slots=True)
class Node:
    """What all circles of a keeper share."""

    rank: int
    home: Home
    key: bytes
    expect_members: Callable[[], None]
    """called on node 0 when other nodes will want to join"""
    disconnect_members: Callable[[str], None]
    """called with the job when other nodes' keepers have to join anew"""


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
        self.member.work.close()
        for lane in self.lanes:
            lane.close()


class Circle:
    """See above."""

    def __init__(self, job: str, *, node: Node) -> None:
        self._job, self._node = job, node
        self._shelf = Shelf()
        self._places = Places(self._shelf, job=job, say=self.say)
        self._team: Team | None = None
        self._sessions: set[Session] = set()
        self._coming: set[tuple[int, int]] = set()
        self._missing: set[tuple[int, int]] = set()
        """ranks, with their world size, that left without a word"""
        self._events: EventLog | None = None
        self._idle_since = time.monotonic()

    # -- the end

    @property
    def is_present(self) -> bool:
        """Whether a trainer is there, or just coming."""
        return bool(self._sessions or self._coming)

    @property
    def is_done(self) -> bool:
        """Whether all trainers have said good-bye."""
        return not self.is_present and not self._missing

    @property
    def is_idle(self) -> bool:
        """Whether nobody has been there for a while."""
        limit_s = self._team.config.idle_limit_s if self._team else 0.0
        return not self.is_present and time.monotonic() - self._idle_since > limit_s

    @property
    def busy(self) -> bool:
        """Whether anything is left to write or to agree on."""
        return self._team is not None and self._team.busy

    @property
    def is_needed_elsewhere(self) -> bool:
        """Whether keepers of other nodes are connected to this coordinator."""
        coordinator = self._team.coordinator if self._team else None
        return coordinator is not None and coordinator.num_members > 1

    @property
    def is_stranded(self) -> bool:
        """Whether there is something to write, and no coordinator to see to it."""
        return self._team is not None and self._team.member.is_stranded

    def close(self) -> None:
        """Give everything back."""
        self._places.close()
        if self._team:
            self._team.close()
        for slots in self._shelf.ranks:
            slots.arena.close()
        if self._events:
            self._events.close()

    # -- trainers

    async def welcome(self, hello: Hello, fd: int) -> Answer:
        """A trainer has come; takes over ``fd``, the memory that it brings (-1: none)."""
        try:
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
        session = Session(slots, member=team.member, allocated=allocated, status=self.status)
        self._sessions.add(session)
        self._missing = {who for who in self._missing if who[0] == hello.world_size} - {hello.who}
        team.member.arrive(slots)
        return Answer(
            Frame({"first_slot": slots.arena.shape.first_slot}),
            fd=-1 if hello.returns else os.dup(slots.arena.fd),
            serve=lambda end: self._serve(session, end),
            leave=lambda: self._leave(session),
        )

    def fetch(self, name: str) -> Answer:
        """Memory, for reading."""
        return self._places.fetch(name)

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
            self.say("warning", "trainer_gone", f"rank {session.slots.rank} is gone without a word")

    # -- the team

    def coordinator(self, config: KeeperConfig) -> Coordinator:
        """The coordinator for a member with this configuration; raises Refusal."""
        if self._team is None or self._team.coordinator is None:
            raise Refusal("no rank of node 0 has come yet")
        if self._team.config != config:
            raise Refusal("the coordinator works with another configuration")
        return self._team.coordinator

    def _team_for(self, hello: Hello) -> Team:
        """The team of this configuration: that of the first trainer, or of the first after all others have left."""
        config, node = hello.config, self._node
        if self._team and self._team.config == config:
            return self._team
        if self._team:
            self._team.close()
            node.disconnect_members(self._job)
        self._open_events(config)
        lanes = [
            Lane(index, tier, node_rank=node.rank, num_threads=1 if index else 3)
            for index, tier in enumerate(config.tiers)
        ]
        member = Member(job=self._job, mesh=config.mesh, lanes=lanes, shelf=self._shelf, say=self.say)
        team = self._team = Team(config, lanes, member)
        if node.rank == 0:
            team.coordinator = Coordinator(config, lanes=lanes, say=self.say)
            LocalLink(member, team.coordinator)
            if hello.num_nodes > 1:
                node.expect_members()
        else:
            team.link = RemoteLink(member, job=self._job, home=node.home, key=node.key, config=config)
        return team

    # -- telling

    def _open_events(self, config: KeeperConfig) -> None:
        if self._events:
            self._events.close()
            self._events = None
        if config.events:
            path = Path(config.events) / f"keeper-{self._node.rank}.jsonl"
            try:
                self._events = EventLog([JsonlSink(path)], rank=self._node.rank)
            except OSError as error:
                self.say("warning", "no_events", f"events cannot be written to {path}: {error.strerror}")

    def say(self, level: str, event: str, text: str, **attributes: Any) -> None:
        """Whatever people should know: to the events, and what is not well to the trainers and to stderr."""
        if self._events:
            self._events.event(f"keeper.{event}", level=level, text=text, **attributes)
        if level != "info":
            for session in self._sessions:
                session.notice({"event": event, "level": level, "text": text, **attributes})
            with contextlib.suppress(OSError):
                print(f"{time.strftime('%F %T')} {level}: {text}", file=sys.stderr, flush=True)

    def status(self) -> dict[str, Any]:
        """For people and metrics."""
        team = self._team
        return {
            "job": self._job,
            "node_rank": self._node.rank,
            "pid": os.getpid(),
            "linked": team is not None and team.member.is_linked,
            "tiers": [lane.status() for lane in team.lanes] if team else [],
            "ranks": [slots.status() for slots in self._shelf.ranks],
        }
