"""One output stream of a rank, from its pipe to console, log file and memory of the last lines."""

import os
from pathlib import Path
from typing import IO

from .output import Console, Lines, Tail

READ_BYTES = 1 << 16


class Stream:
    """Reads ``pipe`` without blocking; ``prefix`` None passes bytes on as they come.

    ``console`` and ``log`` may each be missing; the log gets the bytes as they are.
    """

    def __init__(
        self,
        pipe: IO[bytes],
        *,
        console: Console | None,
        prefix: bytes | None,
        log: Path | None,
        errors: Console,
    ) -> None:
        os.set_blocking(pipe.fileno(), False)
        self.closed = False
        self.tail = Tail()
        self.console = console
        self._pipe = pipe
        self._prefix = prefix
        self._lines = Lines()
        self._errors = errors
        self._log = log.open("wb") if log else None

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._pipe.fileno()

    @property
    def blocked(self) -> bool:
        """Whether the rank should wait for the console's reader."""
        return self.console is not None and self.console.full

    def pump(self, now: float) -> bool:
        """Pass on what has arrived; whether there was anything."""
        try:
            data = os.read(self._pipe.fileno(), READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.closed = True
            self._show(self._lines.close())
            return False
        self.tail.feed(data, now=now)
        self._keep(data)
        if self._prefix is not None:
            self._show(self._lines.feed(data))
        elif self.console:
            self.console.write(data)
        return True

    def finish(self, *, now: float) -> None:
        """Pass on what is left when the rank is gone, even if a stray process still holds the pipe open."""
        while not self.closed and self.pump(now):
            pass
        if not self.closed:
            self.closed = True
            self._show(self._lines.close())
        if self._log:
            self._log.close()

    def _show(self, lines: list[bytes]) -> None:
        if self.console and lines:
            prefix = self._prefix or b""
            self.console.write(b"".join(prefix + line + b"\n" for line in lines))

    def _keep(self, data: bytes) -> None:
        """Write to the log; a full disk costs the log, not the job."""
        if self._log is None:
            return
        try:
            self._log.write(data)
            self._log.flush()
        except OSError as error:
            self._errors.write(f"[launch] {self._log.name} is incomplete: {error.strerror}\n".encode())
            self._log.close()
            self._log = None
