"""Connections between the keepers of a job: a member here to the coordinator, wherever that is."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

from distrain.checkpoint.keeper_config import KeeperConfig
from distrain.core.errors import DistrainError
from distrain.core.sidecar_home import COORDINATOR, Home
from distrain.core.wire import WireError, accept, initiate
from distrain.core.wire_ends import AsyncEnd

from .coordinator import Coordinator
from .member import Member
from .terms import Message

PURPOSE = "keeper member"
BACKOFF_S = (0.05, 2.0)
TELL_S = 5.0
"""a coordinator that has not been found by then is missed aloud"""
SILENCE_S = 20
"""after which a node that vanished without closing its connections counts as lost"""


class LocalLink:
    """Member and coordinator in one process; messages are delivered one after the other, never inside each other."""

    def __init__(self, member: Member, coordinator: Coordinator) -> None:
        self._member, self._coordinator = member, coordinator
        self._number = coordinator.attach(self._receive)
        member.link(self)

    def send(self, message: Message, payload: bytes = b"") -> None:
        """To the coordinator."""
        loop = asyncio.get_running_loop()
        loop.call_soon(self._coordinator.take, self._number, message, payload)

    def _receive(self, message: Message, payload: bytes) -> None:
        asyncio.get_running_loop().call_soon(self._member.hear, message, payload)


class RemoteLink:
    """The connection of a member to a coordinator on another node, made anew whenever it breaks."""

    def __init__(self, member: Member, *, job: str, home: Home, key: bytes, config: KeeperConfig) -> None:
        self._member, self._job, self._home, self._key, self._config = member, job, home, key, config
        self._end: AsyncEnd | None = None
        self._task = asyncio.ensure_future(self._keep_up())

    def send(self, message: Message, payload: bytes = b"") -> None:
        """To the coordinator; nothing happens while there is none, it is told everything anew when it comes."""
        if self._end:
            self._end.send(message, payload)

    def close(self) -> None:
        """End the connection for good."""
        self._task.cancel()
        if self._end:
            self._end.close()

    async def _keep_up(self) -> None:
        clock = asyncio.get_running_loop().time
        pause, since, has_told = BACKOFF_S[0], clock(), False
        while True:
            try:
                await self._work()
                reason = "it closed the connection"
            except (OSError, ValueError, WireError) as error:
                reason = str(error)
            if self._member.is_linked:
                pause, since, has_told = BACKOFF_S[0], clock(), True
                self._member.unlink(reason)
            elif not has_told and clock() - since > TELL_S:
                has_told = True
                self._member.unlink(reason)
            await asyncio.sleep(pause)
            pause = min(2 * pause, BACKOFF_S[1])

    async def _work(self) -> None:
        """Connect, and do what the coordinator says until the connection breaks."""
        if not (address := self._home.coordinator()):
            raise WireError(f"nobody has said where it is; `distrain launch` does, or set {COORDINATOR}")
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        _watch(writer)
        self._end = None
        end = await AsyncEnd.shake(reader, writer, initiate(self._key, purpose=PURPOSE))
        try:
            end.send({"do": "join", "job": self._job, "config": self._config.to_json()})
            answer = await end.receive()
            if "refused" in answer.header:
                raise WireError(str(answer.header["refused"]))
            self._end = end
            self._member.link(self)
            while True:
                frame = await end.receive()
                self._member.hear(frame.header, frame.payload)
        finally:
            self._end = None
            end.close()


class MembersServer:
    """Takes the connections of other nodes' keepers."""

    def __init__(
        self, tcp: socket.socket, *, key: bytes, coordinator: Callable[[str, KeeperConfig], Coordinator]
    ) -> None:
        """``coordinator`` gives the one for a member by job and configuration, or raises why there is none."""
        self._key, self._coordinator = key, coordinator
        self._ends: dict[AsyncEnd, str] = {}
        """with the job"""
        self._task = asyncio.ensure_future(self._listen(tcp))

    def disconnect(self, job: str) -> None:
        """Have all members of a job come anew."""
        for end in [end for end, of in self._ends.items() if of == job]:
            end.close()

    async def _listen(self, tcp: socket.socket) -> None:
        async with await asyncio.start_server(self._take, sock=tcp) as server:
            await server.serve_forever()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(WireError, OSError):
            _watch(writer)
            end = await AsyncEnd.shake(reader, writer, accept(self._key, purpose=PURPOSE))
            try:
                await self._serve(end)
            finally:
                self._ends.pop(end, None)
                end.close()

    async def _serve(self, end: AsyncEnd) -> None:
        frame = await end.receive()
        try:
            self._ends[end] = job = str(frame.header["job"])
            coordinator = self._coordinator(job, KeeperConfig.from_json(frame.header["config"]))
        except (DistrainError, KeyError, TypeError) as error:
            end.send({"refused": str(error)})
            return
        end.send({"welcome": True})
        number = coordinator.attach(end.send)
        try:
            while True:
                frame = await end.receive()
                try:
                    coordinator.take(number, frame.header, frame.payload)
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    raise WireError("a member talks nonsense", got=repr(error)) from error
        finally:
            coordinator.detach(number)


def _watch(writer: asyncio.StreamWriter) -> None:
    """Let the kernel notice a node that is gone without a word."""
    connection: Any = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE_S // 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE_S // 4)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)
