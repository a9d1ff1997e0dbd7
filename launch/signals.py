"""Signals as events that the agent's loop can wait for, instead of code that runs in the middle of things."""

import os
import signal
import socket
import threading
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""passed on to the ranks, and the job ends"""
PASSING = (signal.SIGUSR1, signal.SIGUSR2)
"""passed on to the ranks, and the job goes on"""


def _note(_signum: int, _frame: FrameType | None) -> None:
    """The wake-up descriptor already tells the loop; without a handler the default action would win."""


class Signals:
    """While open, ``fileno`` becomes readable when a signal arrives; what was ignored (nohup) stays ignored."""

    def __enter__(self) -> "Signals":
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._old = {}
        self._old_fd = -1
        if threading.current_thread() is threading.main_thread():
            self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            caught = [each for each in STOPPING + PASSING if signal.getsignal(each) is not signal.SIG_IGN]
            self._old = {signum: signal.signal(signum, _note) for signum in caught}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._old:
            signal.set_wakeup_fd(self._old_fd)
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._reader.fileno()

    def take(self) -> list[int]:
        """The signals that have arrived, in order."""
        try:
            return [each for each in os.read(self._reader.fileno(), 512) if each in STOPPING + PASSING]
        except BlockingIOError:
            return []
