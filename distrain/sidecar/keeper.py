"""The keeper: one process a node that holds the snapshots of its ranks and sees them to disk.

One event loop, no state that is not in it. Trainers come over a unix socket: who they are is settled in a thread (the
handshake, and the memory that is handed over), their requests are answered by a ``Session``. Node 0's keeper
coordinates; on other nodes a connection to it is kept up.

It ends when the job does: when the launcher that leased it is gone, or all trainers have said good-bye, and nothing is
left to write; or when nobody has been there for a while. Losing a trainer ends nothing.
"""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from distrain.checkpoint.arena import Arena, ArenaShape
from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.keeper_config import KeeperConfig
from distrain.checkpoint.record import MAX_WRITERS
from distrain.checkpoint.untrusted import integer, table
from distrain.core import shared_memory
from distrain.core.errors import DistrainError
from distrain.core.events import EventLog, JsonlSink
from distrain.core.sidecar_connection import PURPOSE
from distrain.core.sidecar_home import Home
from distrain.core.wire import Frame, Header, WireError, accept
from distrain.core.wire_ends import AsyncEnd, SyncEnd

from .adopt import Claim, adopt, read_claims
from .coordinator import Coordinator
from .lanes import Lane
from .links import LocalLink, MembersServer, RemoteLink
from .member import Member, one_line
from .session import Refusal, Session
from .slots import RankSlots, State

LOOK_S = 0.25
"""between two looks at whether it is time to end"""
TURN_S = 10.0
"""how long a trainer waits for the one whose place it takes"""
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


@dataclass(frozen=True, slots=True)
class Hello:
    """Who a trainer says it is."""

    rank: int
    world_size: int
    num_nodes: int
    shape: ArenaShape
    config: KeeperConfig
    returns: bool

    @property
    def who(self) -> tuple[int, int]:
        """World size and rank."""
        return self.world_size, self.rank

    @classmethod
    def read(cls, header: Header, *, job: str) -> "Hello":
        """Raises DamageError, ConfigError or Refusal for what cannot be."""
        if header.get("job") != job:
            raise Refusal("this is the keeper of another job", got=str(header.get("job"))[:80])
        world = integer(header.get("world_size"), "world_size", low=1, high=MAX_WRITERS)
        try:
            config = KeeperConfig.from_json(table(header.get("config"), "config"))
        except (TypeError, KeyError, AttributeError) as cause:
            raise Refusal("the configuration is not one", got=str(cause)) from None
        return cls(
            rank=integer(header.get("rank"), "rank", high=world - 1),
            world_size=world,
            num_nodes=integer(header.get("num_nodes"), "num_nodes", low=1, high=MAX_WRITERS),
            shape=ArenaShape(
                slot_bytes=integer(header.get("slot_bytes"), "slot_bytes"),
                num_slots=integer(header.get("num_slots"), "num_slots"),
            ),
            config=config,
            returns=header.get("returns") is True,
        )


class Keeper:
    """The whole process; ``run`` it in an event loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._home = Home(options.job, node_rank=options.node_rank)
        self._key = self._home.key()
        self._listener = socket.socket(fileno=options.listen_fd)
        self._config: KeeperConfig | None = None
        self._lanes: list[Lane] = []
        self._member: Member | None = None
        self._coordinator: Coordinator | None = None
        self._links: list[RemoteLink] = []
        self._members: MembersServer | None = None
        self._sessions: set[Session] = set()
        self._allocations: dict[str, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._introductions = ThreadPoolExecutor(8, "introduce")
        self._memory = ThreadPoolExecutor(2, "memory")
        self._events: EventLog | None = None
        self._names = count()
        self._coming: set[tuple[int, int]] = set()
        self._missing: set[tuple[int, int]] = set()
        """ranks, with their world size, that left without a word"""
        self._is_leased = options.lease_fd is not None
        self._lease_is_over = False
        self._is_stopping = False
        self._idle_since = time.monotonic()
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Serve until the job is over."""
        loop = asyncio.get_running_loop()
        for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(ignored, signal.SIG_IGN)
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        if self._options.lease_fd is not None:
            loop.add_reader(self._options.lease_fd, self._lease_ends)
        self._listener.setblocking(False)
        serving = asyncio.ensure_future(self._accept())
        if self._options.tcp_fd is not None:
            self._listen_to_members()
        try:
            await self._until_over()
        finally:
            serving.cancel()
            self._close()

    # -- ends

    def _stop(self) -> None:
        self._is_stopping = True

    def _lease_ends(self) -> None:
        if self._options.lease_fd is not None:
            asyncio.get_running_loop().remove_reader(self._options.lease_fd)
        self._lease_is_over = True

    async def _until_over(self) -> None:
        since: float | None = None
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if self._sessions:
                self._idle_since, since = now, None
                continue
            idle_limit_s = self._config.idle_limit_s if self._config else KeeperConfig().idle_limit_s
            is_idle = now - self._idle_since > idle_limit_s
            is_done = self._member is not None and not self._missing and not self._coming
            wants_to = self._is_stopping or (self._lease_is_over if self._is_leased else is_done)
            if not wants_to and (self._is_leased or not is_idle):
                continue
            if not self._busy and (self._no_others or is_idle):
                return
            since = since or now
            if now - since > HANG_S:
                self._say(
                    "error", "hang", f"a disk has not answered for {HANG_S:g} s: the keeper ends without it"
                )
                return

    @property
    def _busy(self) -> bool:
        return bool(
            (self._member and self._member.busy)
            or (self._coordinator and self._coordinator.busy)
            or self._tasks
        )

    @property
    def _no_others(self) -> bool:
        """Whether no other node needs this one to coordinate."""
        return self._coordinator is None or self._coordinator.num_members <= 1

    def _close(self) -> None:
        for link in self._links:
            link.close()
        if self._coordinator:
            self._coordinator.close()
        with contextlib.suppress(OSError):
            self._home.remove()
        if self._events:
            self._events.close()

    # -- trainers

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            if _peer_uid(connection) != os.getuid():
                connection.close()
                continue
            connection.setblocking(True)
            self._spawn(self._introduce(connection))

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._say("error", "internal_error", one_line(error))

    async def _introduce(self, connection: socket.socket) -> None:
        """Hear who has come, and give what they came for."""
        run = asyncio.get_running_loop().run_in_executor
        try:
            end, frame, fd = await run(self._introductions, _hear, connection, self._key)
        except (WireError, OSError):
            connection.close()
            return
        try:
            session, answer, given = None, Frame({}), -1
            try:
                if frame.header.get("do") == "fetch":
                    answer, given = self._fetch(str(frame.header.get("arena")))
                else:
                    session, given = await self._welcome(frame, fd)
                    answer = Frame({"first_slot": session.slots.arena.shape.first_slot})
            except DistrainError as error:
                problem = error.problems[0]
                answer = Frame({"refused": problem.error, "got": problem.got})
            await run(self._introductions, _reply, end, answer, given)
        except (WireError, OSError):
            end.close()
            if session:
                self._leave(session)
            return
        finally:
            if given >= 0:
                os.close(given)
        if session is None:
            end.close()
            return
        reader, writer = await asyncio.open_connection(sock=end.socket)
        serving = asyncio.ensure_future(self._serve(session, AsyncEnd(reader, writer, end.session)))
        self._serving.add(serving)
        serving.add_done_callback(self._served)

    def _served(self, task: "asyncio.Task[None]") -> None:
        self._serving.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._say("error", "internal_error", one_line(error))

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
        if self._member:
            self._member.leave(session.slots)
        if not session.said_bye:
            self._missing.add((session.slots.world_size, session.slots.rank))
            self._say("warning", "trainer_gone", f"rank {session.slots.rank} is gone without a word")

    async def _welcome(self, frame: Frame, fd: int) -> tuple[Session, int]:
        """A trainer: its place, and a descriptor of its memory to give it (-1 if it has brought it)."""
        try:
            hello = Hello.read(frame.header, job=self._options.job)
            claims = read_claims(frame.payload) if hello.returns else {}
            async with self._turn:
                await self._make_room(hello)
                self._coming.add(hello.who)
                member = self._configure(hello)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        try:
            slots = await self._place(member, hello, fd, claims)
        finally:
            self._coming.discard(hello.who)
        session = Session(slots, member=member, allocated=self._allocate(slots), status=self._status)
        self._sessions.add(session)
        self._missing = {(world, rank) for world, rank in self._missing if world == hello.world_size} - {
            hello.who
        }
        member.arrive(slots)
        return session, -1 if hello.returns else os.dup(slots.arena.fd)

    async def _make_room(self, hello: Hello) -> None:
        """Wait for those in whose place this trainer comes, who may be ending at the moment."""
        deadline = time.monotonic() + TURN_S
        while reason := self._conflict(hello):
            if time.monotonic() > deadline:
                raise Refusal(reason)
            await asyncio.sleep(0.02)

    def _conflict(self, hello: Hello) -> str:
        if hello.who in self._coming:
            return f"another rank {hello.rank} is just coming"
        for session in self._sessions:
            if session.slots.world_size != hello.world_size:
                return f"ranks of a job of world size {session.slots.world_size} are still there"
            if session.slots.rank == hello.rank:
                return f"rank {hello.rank} is still there"
        if (
            self._config is not None
            and self._config != hello.config
            and (self._sessions or self._busy_writing)
        ):
            return "the keeper works with another configuration"
        return ""

    @property
    def _busy_writing(self) -> bool:
        return bool((self._member and self._member.busy) or (self._coordinator and self._coordinator.busy))

    def _configure(self, hello: Hello) -> Member:
        """Take on the configuration of the first trainer, or of the first after all others have left."""
        if self._member and self._config == hello.config:
            return self._member
        ranks = self._member.ranks if self._member else []
        self._forget_configuration()
        self._config = config = hello.config
        if config.events:
            path = Path(config.events) / f"keeper-{self._options.node_rank}.jsonl"
            with contextlib.suppress(OSError):
                self._events = EventLog([JsonlSink(path)], rank=self._options.node_rank)
        self._lanes = [
            Lane(index, tier, num_threads=1 if index else 2) for index, tier in enumerate(config.tiers)
        ]
        self._member = member = Member(
            job=self._options.job, mesh=config.mesh, lanes=self._lanes, say=self._say
        )
        member.ranks = ranks
        if self._options.node_rank == 0:
            self._coordinator = Coordinator(config, lanes=self._lanes, say=self._say)
            LocalLink(member, self._coordinator)
            if hello.num_nodes > 1:
                self._listen_to_members()
        else:
            self._links.append(RemoteLink(member, home=self._home, key=self._key, config=config))
        return member

    def _forget_configuration(self) -> None:
        for link in self._links:
            link.close()
        self._links.clear()
        for lane in self._lanes:
            lane.close()
        if self._coordinator:
            self._coordinator.close()
        if self._members:
            self._members.disconnect()
        if self._events:
            self._events.close()
            self._events = None

    async def _place(self, member: Member, hello: Hello, fd: int, claims: dict[int, Claim]) -> RankSlots:
        """The slots of a rank: those that it had, those that it has brought, or new ones."""
        old = next(
            (each for each in member.ranks if (each.world_size, each.rank) == hello.who and not each.retired),
            None,
        )
        if hello.returns:
            arena = Arena(hello.shape, fd)
            if old and os.path.sameopenfile(old.arena.fd, fd):
                arena.close()
                return old
        elif old and old.arena.shape == hello.shape:
            return old
        else:
            arena = Arena.create(hello.shape)
        if old:
            old.retired = True
        name = f"{hello.world_size}-{hello.rank}-{next(self._names)}"
        slots = RankSlots(name, arena, rank=hello.rank, world_size=hello.world_size)
        await self._adopt(slots, claims)
        return slots

    async def _adopt(self, slots: RankSlots, claims: dict[int, Claim]) -> None:
        """Take over what the memory holds, oldest first."""
        run = asyncio.get_running_loop().run_in_executor
        for index, claim in sorted(claims.items(), key=lambda item: item[1].step):
            if index >= len(slots.snapshots):
                continue
            try:
                memory = await run(self._memory, lambda i=index, c=claim: self._adopted(slots, i, c))  # type: ignore[misc]
            except DamageError as error:
                self._say(
                    "warning", "not_adopted", f"rank {slots.rank}, step {claim.step}: {one_line(error)}"
                )
                continue
            slots.adopt(index, step=claim.step, memory=memory, objects=claim.objects)
            self._say("info", "adopted", f"rank {slots.rank}: step {claim.step} is in memory")

    def _adopted(self, slots: RankSlots, index: int, claim: Claim) -> Any:
        return adopt(
            slots.arena, index, claim, job=self._options.job, writer=slots.rank, world_size=slots.world_size
        )

    def _allocate(self, slots: RankSlots) -> "asyncio.Future[None]":
        """Give the memory its pages, in the background."""
        known = self._allocations.get(slots.name)
        if known is None or (known.done() and known.exception()):
            known = asyncio.get_running_loop().run_in_executor(
                self._memory, slots.arena.allocate, lambda: not self._is_stopping
            )
            known.add_done_callback(lambda future: future.exception())
            self._allocations[slots.name] = known
        return known

    def _fetch(self, name: str) -> tuple[Frame, int]:
        """Memory for reading."""
        ranks = self._member.ranks if self._member else []
        slots = next((each for each in ranks if each.name == name), None)
        if slots is None:
            raise Refusal("there is no such memory", got=name[:80])
        return Frame({"nbytes": slots.arena.shape.nbytes}), shared_memory.read_only(slots.arena.fd)

    # -- other nodes

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
        if self._config is not None and config != self._config:
            raise Refusal("the coordinator works with another configuration")
        if self._coordinator is None:
            raise Refusal("no rank of node 0 has come yet")
        return self._coordinator

    # -- telling

    def _say(self, level: str, event: str, text: str, **attributes: Any) -> None:
        """Whatever people should know: to the trainers, to the events, and what is bad to stderr."""
        if self._events:
            self._events.event(f"keeper.{event}", level=level, text=text, **attributes)
        if level != "info":
            for session in self._sessions:
                session.notice({"event": event, "level": level, "text": text, **attributes})
            with contextlib.suppress(OSError):
                print(f"{time.strftime('%F %T')} {level}: {text}", file=sys.stderr, flush=True)

    def _status(self) -> dict[str, Any]:
        ranks = self._member.ranks if self._member else []
        return {
            "job": self._options.job,
            "node_rank": self._options.node_rank,
            "pid": os.getpid(),
            "linked": bool(self._member and self._member.is_linked),
            "tiers": [lane.status() for lane in self._lanes],
            "ranks": [_describe(slots) for slots in ranks],
        }


def _describe(slots: RankSlots) -> dict[str, Any]:
    rows = [
        {"state": State.FREE.value}
        if each is None
        else {
            "state": each.state.value,
            "step": each.step,
            "streams": each.memory.streams,
            "num_copied": len(each.copied),
            "num_extents": each.memory.layout.num_extents,
            "needed_by": sorted(each.needs),
            "num_readers": each.num_readers,
            "discarded": each.discarded,
        }
        for each in slots.snapshots
    ]
    return {
        "rank": slots.rank,
        "world_size": slots.world_size,
        "nbytes": slots.arena.shape.nbytes,
        "retired": slots.retired,
        "slots": rows,
    }


def _peer_uid(connection: socket.socket) -> int:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)


def _hear(connection: socket.socket, key: bytes) -> tuple[SyncEnd, Frame, int]:
    """Shake hands, and hear what the trainer wants, with the memory that it brings if it does."""
    end = SyncEnd.shake(connection, accept(key, purpose=PURPOSE))
    frame = end.receive(timeout_s=30.0)
    fd = -1
    if frame.header.get("returns") is True:
        connection.settimeout(5.0)
        _, fds, _, _ = socket.recv_fds(connection, 1, 1)
        connection.settimeout(None)
        if len(fds) != 1:
            raise WireError("the memory was not handed over")
        fd = fds[0]
        os.set_inheritable(fd, False)
    return end, frame, fd


def _reply(end: SyncEnd, answer: Frame, fd: int) -> None:
    end.send(answer.header, answer.payload)
    if fd >= 0:
        socket.send_fds(end.socket, [b"\0"], [fd])
