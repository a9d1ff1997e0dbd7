"""The output of many ranks on one console: whole lines, each with its rank in front, no byte lost.

Bytes stay bytes: what a rank writes need not be UTF-8. A lone carriage return ends a line too, so that a progress
bar shows as lines instead of piling up. The console never blocks the agent: a reader that stops reading must not
keep it from noticing a dead rank.
"""

import os
import select
from collections import deque
from collections.abc import Mapping

LONGEST_LINE_BYTES = 1 << 16
TAIL_BYTES = 1 << 16
PENDING_BYTES = 1 << 20
COLOURS = (36, 33, 32, 35, 34, 31)
TRACEBACK = b"Traceback (most recent call last):"


def label(rank: int, *, world_size: int, node: str = "", colour: bool = False) -> bytes:
    """``[rank 3] `` or ``[node1 rank 3] ``, as wide for every rank of the job."""
    text = f"[{f'{node} ' if node else ''}rank {rank:>{len(str(world_size - 1))}}]"
    if colour:
        text = f"\x1b[{COLOURS[rank % len(COLOURS)]}m{text}\x1b[0m"
    return text.encode() + b" "


def wants_colour(fd: int, *, environ: Mapping[str, str]) -> bool:
    """Whether ``fd`` is a terminal whose user has not asked for plain text (NO_COLOR, TERM=dumb)."""
    return os.isatty(fd) and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


class Lines:
    """Cuts a stream of bytes into lines; a line longer than 64 KiB comes in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that ``data`` completes, each without its end."""
        text = self._rest + data
        held = b"\r" if text.endswith(b"\r") else b""  # the \n of a \r\n may still come
        lines = text[: len(text) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        rest = lines.pop()
        while len(rest) > LONGEST_LINE_BYTES:
            lines.append(rest[:LONGEST_LINE_BYTES])
            rest = rest[LONGEST_LINE_BYTES:]
        self._rest = rest + held
        return lines

    def close(self) -> list[bytes]:
        """The last line, if the stream ended without a newline."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        return [rest] if rest else []


class Tail:
    """The last 64 KiB of a stream, and when its last traceback began."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._num_bytes = 0
        self.traceback_at = 0.0
        """seconds since the epoch; 0 if there was none"""

    def feed(self, data: bytes, *, now: float) -> None:
        """Take what the stream brought at ``now``."""
        seam = self._pieces[-1][-len(TRACEBACK) :] if self._pieces else b""
        if TRACEBACK in seam + data and not seam.endswith(TRACEBACK):
            self.traceback_at = now
        self._pieces.append(data)
        self._num_bytes += len(data)
        while self._num_bytes - len(self._pieces[0]) >= TAIL_BYTES:
            self._num_bytes -= len(self._pieces.popleft())

    @property
    def text(self) -> str:
        """The tail, with bytes that are not UTF-8 replaced."""
        return b"".join(self._pieces)[-TAIL_BYTES:].decode(errors="replace")


class Console:
    """Writes to a descriptor only as much as it takes at once; the rest waits.

    Pieces end at line ends and fit PIPE_BUF where they can, so that the agents of emulated nodes, which share the
    descriptor, do not cut each other's lines.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._pending = bytearray()
        self._broken = False

    @property
    def waiting(self) -> bool:
        """Whether there is something left to write."""
        return bool(self._pending)

    @property
    def full(self) -> bool:
        """Whether the ranks should be left to wait, as they would on a pipe of their own."""
        return len(self._pending) > PENDING_BYTES

    def write(self, data: bytes) -> None:
        """Take ``data`` and write what can be written now."""
        if not self._broken:
            self._pending += data
            self.pump()

    def pump(self) -> None:
        """Write as long as the descriptor takes it."""
        while self._pending and self._ready(0):
            piece = self._pending[: select.PIPE_BUF]
            end = piece.rfind(b"\n") + 1
            try:
                written = os.write(self.fd, piece[:end] if end else piece)
            except OSError:  # whoever read is gone: the job goes on, its log files too
                self._broken = True
                self._pending.clear()
                return
            del self._pending[:written]

    def flush(self) -> None:
        """Write everything, however long the reader takes."""
        while self._pending:
            self._ready(None)
            self.pump()

    def _ready(self, timeout_ms: int | None) -> bool:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        return bool(poll.poll(timeout_ms))
