"""The two ends of the wire format: sockets in threads, and streams in an event loop. See wire.py."""

import asyncio
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from .wire import PREFIX_BYTES, Frame, Handshake, Header, Receive, Session, WireError, decode, encode, lengths

HANDSHAKE_TIMEOUT_S = 5.0


class SyncEnd:
    """A connection for threads: any of them may send, one receives."""

    def __init__(self, connection: socket.socket, session: Session) -> None:
        self.socket = connection
        self.session = session
        self._sending = threading.Lock()

    @classmethod
    def shake(
        cls, connection: socket.socket, handshake: Handshake, *, timeout_s: float = HANDSHAKE_TIMEOUT_S
    ) -> "SyncEnd":
        """Carry out ``handshake``; the socket blocks from then on.

        Raises:
            WireError: the other end does not have the key, is gone or too slow.
        """
        deadline = time.monotonic() + timeout_s
        frame: Frame | None = None
        try:
            while True:
                step = handshake.send(frame) if frame else next(handshake)
                frame = None
                if isinstance(step, Receive):
                    frame = _receive(connection, step.session, deadline=deadline)
                else:
                    _send(connection, step, deadline=deadline)
        except StopIteration as done:
            connection.settimeout(None)
            return cls(connection, done.value)

    def send(self, header: Header, payload: bytes = b"", *, timeout_s: float = 30.0) -> None:
        """Send one frame.

        Raises:
            WireError: the other end is gone, or has not taken it in time; the connection is of no use then.
        """
        with self._sending:
            data = memoryview(encode(header, payload, session=self.session))
            deadline = time.monotonic() + timeout_s
            while data:
                with _lost():
                    if not _is_writable(self.socket, deadline - time.monotonic()):
                        self.close()
                        raise TimeoutError
                    data = data[self.socket.send(data, socket.MSG_DONTWAIT) :]

    def receive(self, *, timeout_s: float | None = None) -> Frame:
        """Wait for the next frame.

        Raises:
            WireError: the other end is gone, sends nonsense, or nothing within ``timeout_s``.
        """
        if timeout_s is None:
            return _receive(self.socket, self.session, deadline=None)
        try:
            return _receive(self.socket, self.session, deadline=time.monotonic() + timeout_s)
        finally:
            self.socket.settimeout(None)

    def close(self) -> None:
        """End the connection; who waits in ``receive`` is woken."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _receive(connection: socket.socket, session: Session | None, *, deadline: float | None) -> Frame:
    prefix = _read(connection, PREFIX_BYTES, deadline)
    sizes = lengths(prefix, session=session)
    body, payload, tag = (_read(connection, size, deadline) for size in sizes)
    return decode(prefix, body, payload, tag, session=session)


def _read(connection: socket.socket, count: int, deadline: float | None) -> bytes:
    """Exactly ``count`` bytes, never one more: descriptors may follow them."""
    data = bytearray()
    while len(data) < count:
        with _lost():
            if deadline is not None:
                connection.settimeout(max(1e-3, deadline - time.monotonic()))
            part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise WireError("the other end closed the connection")
        data += part
    return bytes(data)


def _send(connection: socket.socket, data: bytes, *, deadline: float) -> None:
    with _lost():
        connection.settimeout(max(1e-3, deadline - time.monotonic()))
        connection.sendall(data)


def _is_writable(connection: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    return bool(poll.poll(max(0.0, timeout_s) * 1e3))


@contextmanager
def _lost() -> Iterator[None]:
    """Turn what sockets raise into WireError."""
    try:
        yield
    except TimeoutError as cause:
        raise WireError("the other end does not answer in time") from cause
    except (OSError, ValueError) as cause:  # ValueError: another thread has closed the socket
        raise WireError("the connection is lost", got=str(cause)) from cause


@dataclass(slots=True, eq=False)
class AsyncEnd:
    """A connection for one event loop. Sending does not wait: who sends much calls ``drain``."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    session: Session
    closed: bool = field(default=False, init=False)

    @classmethod
    async def shake(
        cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handshake: Handshake
    ) -> "AsyncEnd":
        """Carry out ``handshake``; WireError as for SyncEnd, and the connection is closed then."""
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                return cls(reader, writer, await _shake(reader, writer, handshake))
        except TimeoutError:
            writer.close()
            raise WireError("the other end does not answer in time") from None
        except (OSError, EOFError, WireError) as error:
            writer.close()
            raise error if isinstance(error, WireError) else WireError("the connection is lost") from error

    def send(self, header: Header, payload: bytes = b"") -> None:
        """Send one frame; on a closed connection nothing happens, ``receive`` tells."""
        if not self.closed:
            self.writer.write(encode(header, payload, session=self.session))

    async def receive(self) -> Frame:
        """Wait for the next frame; WireError ends it."""
        try:
            return await _receive_async(self.reader, self.session)
        except (OSError, EOFError) as error:
            raise WireError("the other end closed the connection") from error

    def close(self) -> None:
        """End the connection once what was sent is out."""
        self.closed = True
        self.writer.close()


async def _shake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handshake: Handshake) -> Session:
    frame: Frame | None = None
    while True:
        try:
            step = handshake.send(frame) if frame else next(handshake)
        except StopIteration as done:
            session: Session = done.value
            return session
        frame = None
        if isinstance(step, Receive):
            frame = await _receive_async(reader, step.session)
        else:
            writer.write(step)
            await writer.drain()


async def _receive_async(reader: asyncio.StreamReader, session: Session | None) -> Frame:
    prefix = await reader.readexactly(PREFIX_BYTES)
    body, payload, tag = [await reader.readexactly(size) for size in lengths(prefix, session=session)]
    return decode(prefix, body, payload, tag, session=session)
