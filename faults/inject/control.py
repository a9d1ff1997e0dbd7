"""How an armed process and the injector speak: lines of JSON over a unix socket in the folder of the truth.

A fault from outside has to hit a rank at an exact place in its step, which only the rank knows. So the rank asks for
it there and waits until it has happened: it is killed, stopped or slowed down while it waits for the answer::

    rank                               injector
    hello (role, rank, node)    ──►    knows its process id from the kernel
    inject fault 2              ──►    SIGSTOP, sees it stopped, answers, later SIGCONT
    reads the answer            ◄──

Whoever carries the packets between emulated nodes is asked by the injector, in the same form, and answers.

The kernel vouches for who is at the other end; strangers of another user are sent away.
"""

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SOCKET = "injector.sock"
LINE_BYTES = 4096


@contextmanager
def short_path(folder: Path) -> Iterator[str]:
    """The socket's name in a form that fits an address, however long the folder's is."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET}"
    finally:
        os.close(fd)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel says."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


class Lines:
    """Lines of JSON as they arrive."""

    def __init__(self) -> None:
        self._rest = b""

    def add(self, data: bytes) -> list[Mapping[str, Any]]:
        """The tables that are complete now; raises ValueError for anything else."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        if max(map(len, (*whole, self._rest))) > LINE_BYTES:
            raise ValueError("a line is too long")
        tables = [json.loads(line) for line in whole]
        if not all(isinstance(table, dict) for table in tables):
            raise ValueError("a line is no table")
        return tables


def encode(table: Mapping[str, Any]) -> bytes:
    """One line."""
    return json.dumps(table).encode() + b"\n"


class Control:
    """The armed process's end."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lines = connection, Lines()
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, folder: Path, *, hello: Mapping[str, Any]) -> "Control | None":
        """Say who this is; None if no injector listens in ``folder``."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with short_path(folder) as path:
                connection.connect(path)
            connection.sendall(encode({"do": "hello", **hello}))
        except OSError:
            connection.close()
            return None
        return cls(connection)

    def tell(self, **table: Any) -> None:
        """Send a request that has no answer; nothing happens if the injector is gone."""
        with contextlib.suppress(OSError):
            self._connection.sendall(encode(table))

    def ask(self, **table: Any) -> Mapping[str, Any]:
        """Send a request and wait for its answer; empty if the injector is gone."""
        with self._lock:
            self.tell(**table)
            while True:
                try:
                    data = self._connection.recv(LINE_BYTES)
                except OSError:
                    data = b""
                if not data:
                    return {}
                if answers := self._lines.add(data):
                    return answers[0]

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._connection.fileno()

    def receive(self) -> list[Mapping[str, Any]] | None:
        """What the injector asks for by itself, once the descriptor is readable; None if it is gone."""
        try:
            data = self._connection.recv(LINE_BYTES)
            return self._lines.add(data) if data else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Leave."""
        self._connection.close()
