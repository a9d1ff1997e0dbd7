"""A request to stop, which a job answers between two steps: schedulers send SIGTERM before they take a node away.

Ranks get the signal at different moments, and a rank that left at once would leave the others in a collective. So each
only notes it, all of them learn of it with the loss of the step, and they end after the same step.
"""

import signal
from types import FrameType, TracebackType
from typing import Self


class StopRequest:
    """Notes the first SIGTERM while in use; a second one has its ordinary effect."""

    def __init__(self) -> None:
        self.is_made = False
        self._old: signal._HANDLER = signal.SIG_DFL

    def __enter__(self) -> Self:
        self._old = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._old)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.is_made = True
        signal.signal(signum, self._old)
