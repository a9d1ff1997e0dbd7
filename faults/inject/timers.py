"""Things to do later, in one loop that has other things to do as well."""

import heapq
from collections.abc import Callable
from itertools import count

from distrain.core.clock import Clock


class Timers:
    """Calls by the time at which they are due."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due: list[tuple[int, int, Callable[[], object]]] = []
        self._order = count()

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Call ``action`` in ``seconds``, or a little later."""
        when_ns = self._clock.monotonic_ns() + round(seconds * 1e9)
        heapq.heappush(self._due, (when_ns, next(self._order), action))

    def patience_s(self) -> float | None:
        """Seconds until the next one is due; None if there is none."""
        if not self._due:
            return None
        return max(0.0, (self._due[0][0] - self._clock.monotonic_ns()) / 1e9)

    def run(self) -> None:
        """Call all that are due."""
        while self._due and self._due[0][0] <= self._clock.monotonic_ns():
            heapq.heappop(self._due)[2]()
