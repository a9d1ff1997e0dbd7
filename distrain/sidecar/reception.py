"""Where trainers come in: who they are, what they bring, what they are given.

Descriptors travel beside the bytes of a unix socket, which streams of an event loop cannot receive. So the first words
are exchanged in a thread; after that the connection belongs to the loop.
"""

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from distrain.checkpoint.arena import ArenaShape
from distrain.checkpoint.keeper_config import KeeperConfig
from distrain.checkpoint.record import MAX_WRITERS
from distrain.checkpoint.untrusted import integer, table, text
from distrain.core.errors import DistrainError
from distrain.core.sidecar_connection import PURPOSE
from distrain.core.wire import Frame, Header, WireError, accept
from distrain.core.wire_ends import AsyncEnd, SyncEnd

from .adopt import Claim, read_claims
from .session import Refusal

HELLO_TIMEOUT_S = 30.0
MAX_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who a trainer says it is."""

    rank: int
    world_size: int
    num_nodes: int
    shape: ArenaShape
    config: KeeperConfig
    returns: bool
    """it brings the memory that another keeper has given it"""
    claims: dict[int, Claim]
    """what is in there, by slot"""

    @property
    def who(self) -> tuple[int, int]:
        """World size and rank."""
        return self.world_size, self.rank

    @classmethod
    def read(cls, frame: Frame) -> "Hello":
        """The hello in a frame that is not trusted; raises DistrainError."""
        header = frame.header
        world = integer(header.get("world_size"), "world_size", low=1, high=MAX_WRITERS)
        returns = header.get("returns") is True
        return cls(
            rank=integer(header.get("rank"), "rank", high=world - 1),
            world_size=world,
            num_nodes=integer(header.get("num_nodes"), "num_nodes", low=1, high=MAX_WRITERS),
            shape=ArenaShape(
                slot_bytes=integer(header.get("slot_bytes"), "slot_bytes"),
                num_slots=integer(header.get("num_slots"), "num_slots"),
            ),
            config=_config(header),
            returns=returns,
            claims=read_claims(frame.payload) if returns else {},
        )


def job_of(frame: Frame) -> str:
    """What the newcomer saves, by name; raises DistrainError."""
    return text(frame.header.get("job"), "job", longest=200)


def _config(header: Header) -> KeeperConfig:
    try:
        return KeeperConfig.from_json(table(header.get("config"), "config"))
    except (TypeError, KeyError, AttributeError) as cause:
        raise Refusal("the configuration is not one", got=str(cause)) from None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a newcomer is told."""

    frame: Frame
    fd: int = -1
    """a descriptor to give, which the reception closes"""
    serve: Callable[[AsyncEnd], Awaitable[None]] | None = None
    """what happens on the connection from then on"""
    leave: Callable[[], None] = lambda: None
    """called if the newcomer is gone before that"""


Welcome = Callable[[Frame, int], Awaitable[Answer]]
"""takes the first request, and the descriptor that came with it (-1: none), which it owns"""


class Reception:
    """Takes connections of this user's processes that have the job's key."""

    def __init__(self, listener: socket.socket, *, key: bytes, welcome: Welcome) -> None:
        self._listener, self._key, self._welcome = listener, key, welcome
        self._pool = ThreadPoolExecutor(MAX_AT_ONCE, "introduce")
        self._introducing: set[asyncio.Task[None]] = set()
        self._serving: set[asyncio.Future[None]] = set()
        listener.setblocking(False)
        self._accepting = asyncio.ensure_future(self._accept())

    @property
    def busy(self) -> bool:
        """Whether somebody is just coming in."""
        return any(not task.done() for task in self._introducing)

    def close(self) -> None:
        """Take no more."""
        self._accepting.cancel()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            if _peer_uid(connection) != os.getuid():
                connection.close()
                continue
            connection.setblocking(True)
            task = asyncio.ensure_future(self._take(connection))
            self._introducing.add(task)
            task.add_done_callback(self._introducing.discard)

    async def _take(self, connection: socket.socket) -> None:
        introduced = await self._introduce(connection)
        if introduced is None:
            connection.close()
            return
        end, answer = introduced
        if answer.serve is None:
            end.close()
            return
        reader, writer = await asyncio.open_connection(sock=end.socket)
        serving = asyncio.ensure_future(answer.serve(AsyncEnd(reader, writer, end.session)))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)

    async def _introduce(self, connection: socket.socket) -> tuple[SyncEnd, Answer] | None:
        """Hear who has come, and give what they came for; None if they are gone."""
        run = asyncio.get_running_loop().run_in_executor
        answer = None
        try:
            end, frame, fd = await run(self._pool, _hear, connection, self._key)
            try:
                answer = await self._welcome(frame, fd)
            except DistrainError as error:
                problem = error.problems[0]
                answer = Answer(Frame({"refused": problem.error, "got": problem.got}))
            await run(self._pool, _reply, end, answer)
        except (WireError, OSError):
            if answer:
                answer.leave()
            return None
        finally:
            if answer and answer.fd >= 0:
                os.close(answer.fd)
        return end, answer


def _hear(connection: socket.socket, key: bytes) -> tuple[SyncEnd, Frame, int]:
    """Shake hands, and hear what the newcomer wants, with the memory that it brings if it does."""
    end = SyncEnd.shake(connection, accept(key, purpose=PURPOSE))
    frame = end.receive(timeout_s=HELLO_TIMEOUT_S)
    if frame.header.get("returns") is not True:
        return end, frame, -1
    connection.settimeout(HELLO_TIMEOUT_S)
    _, fds, _, _ = socket.recv_fds(connection, 1, 1)
    connection.settimeout(None)
    if len(fds) != 1:
        raise WireError("the memory was not handed over")
    os.set_inheritable(fds[0], False)
    return end, frame, fds[0]


def _reply(end: SyncEnd, answer: Answer) -> None:
    end.send(answer.frame.header, answer.frame.payload)
    if answer.fd >= 0:
        socket.send_fds(end.socket, [b"\0"], [answer.fd])


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])
