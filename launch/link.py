"""Messages between the agents of a job: one JSON object a line over TCP.

The messages only tell (here I am, my rank failed, all mine have ended); none of them can make a node run anything.
A line longer than 1 MiB, or one that is not a JSON object, ends the link.
"""

import json
import socket
from contextlib import suppress
from typing import Any

LONGEST_MESSAGE_BYTES = 1 << 20
SEND_TIMEOUT_S = 5.0

Message = dict[str, Any]


class Link:
    """One end of a connection between two agents; ``closed`` once the other side is gone or talks nonsense."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SEND_TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._rest = b""
        self.closed = False

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send ``message``; a peer that does not take it within 5 s counts as gone."""
        if self.closed:
            return
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True

    def receive(self) -> list[Message]:
        """The messages that have arrived; call when the descriptor is readable."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            data = b""
        self.closed = self.closed or not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                self.closed = True
                break
            messages.append(message)
        if len(self._rest) > LONGEST_MESSAGE_BYTES:
            self.closed = True
        return messages

    def close(self) -> None:
        """End the connection."""
        self.closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
