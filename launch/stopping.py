"""The ladder of signals by which ranks are stopped: politely first, by SIGKILL last. Pure but for its memory."""

import math
import signal
from collections.abc import Sequence

FAILURE_GRACE_S = 5.0
INTERRUPT_GRACE_S = 5.0
TERM_GRACE_S = 30.0
"""as torchrun: whoever sends SIGTERM may want a last checkpoint"""
GIVE_UP_S = 5.0
"""a process that outlives SIGKILL this long hangs in the kernel"""


class Ladder:
    """Signals and the times at which they are due."""

    def __init__(self, steps: Sequence[tuple[float, int]], *, now: float) -> None:
        self.began_at = now
        self.gives_up_at = math.inf
        """when to stop waiting for what does not die"""
        self._steps = [(now + delay_s, signum) for delay_s, signum in steps]

    @classmethod
    def after_failure(cls, *, grace_s: float | None, now: float) -> "Ladder":
        """SIGTERM, then SIGKILL."""
        grace_s = FAILURE_GRACE_S if grace_s is None else grace_s
        return cls([(0.0, signal.SIGTERM), (grace_s, signal.SIGKILL)], now=now)

    @classmethod
    def after_signal(cls, signum: int, *, grace_s: float | None, now: float) -> "Ladder":
        """The same signal, then SIGTERM if it was another one, then SIGKILL."""
        if signum == signal.SIGTERM:
            return cls.after_failure(grace_s=TERM_GRACE_S if grace_s is None else grace_s, now=now)
        grace_s = INTERRUPT_GRACE_S if grace_s is None else grace_s
        return cls([(0.0, signum), (grace_s, signal.SIGTERM), (2 * grace_s, signal.SIGKILL)], now=now)

    def due(self, *, now: float) -> list[int]:
        """The signals to send now; each comes once."""
        due = [signum for at, signum in self._steps if at <= now]
        self._steps = self._steps[len(due) :]
        if not self._steps and due:
            self.gives_up_at = now + GIVE_UP_S
        return due

    @property
    def next_at(self) -> float:
        """When the next step is due."""
        return self._steps[0][0] if self._steps else self.gives_up_at

    @property
    def exhausted(self) -> bool:
        """Whether SIGKILL has been due; what is born since needs another."""
        return not self._steps

    def hurry(self, *, now: float) -> None:
        """Make the next step due at once, and the others as much earlier."""
        if self._steps:
            ahead = max(0.0, self._steps[0][0] - now)
            self._steps = [(at - ahead, signum) for at, signum in self._steps]
