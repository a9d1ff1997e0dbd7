"""Which steps are saved: every so many, or as many as pay.

With ``Auto`` the first step is saved to see what a save costs. At each save the ranks then agree on the next: the
slowest of them decides, since all wait for it.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from distrain.core.errors import ConfigError

from .interval import interval_s

RECENT_STEPS = 32

Agree = Callable[[list[float]], list[list[float]]]
"""the values of all ranks, by rank"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """Save as often as Young and Daly advise for the stall that is measured, within a budget."""

    overhead: float = 0.02
    """largest share of the time that training may wait for saves"""
    node_mtbf_h: float = 6300.0
    """hours between two failures of one node; Llama 3 405B: 419 in 54 days on 2,048 nodes of 8 GPUs"""

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be."""
        if not 0 < self.overhead < 1 or not self.node_mtbf_h > 0:
            raise ConfigError(
                "the automatic interval cannot be computed",
                got=f"overhead {self.overhead:g}, node_mtbf_h {self.node_mtbf_h:g}",
                allowed="an overhead between 0 and 1, and hours above 0",
            )


class Cadence:
    """Decides step by step; the same calls on every rank."""

    def __init__(self, every: int | Auto, *, num_nodes: int, num_slots: int) -> None:
        if isinstance(every, int) and every < 1:
            raise ConfigError(
                "a snapshot cannot be taken so often", got=f"every {every} steps", allowed="1 or more"
            )
        self._every, self._num_slots = every, num_slots
        self._mtbf_s = every.node_mtbf_h * 3600 / num_nodes if isinstance(every, Auto) else math.inf
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        """seconds of recent steps"""
        self._last: float | None = None
        self._next = 0
        self._stalled = 0.0

    def is_due(self, step: int, *, now: float) -> bool:
        """Whether ``step``, which has just ended, is to be saved; ``now`` in seconds of any clock."""
        if isinstance(self._every, int):
            return step % self._every == 0
        if self._last is not None:
            self._steps.append(now - self._last)
        self._last = now
        return step >= self._next

    def saved(self, step: int, *, stalled_s: float, flush_s: Callable[[], float], agree: Agree) -> None:
        """Plan the next save; ``stalled_s`` counts all stalls so far, ``flush_s`` tells how long a flush takes."""
        if isinstance(self._every, int):
            return
        stall_s, self._stalled = stalled_s - self._stalled, stalled_s
        step_s = statistics.median(self._steps) if self._steps else 0.0
        every_rank = zip(*agree([step_s, stall_s, flush_s()]), strict=True)
        step_s, stall_s, slowest_flush_s = (max(values) for values in every_rank)
        if not step_s:  # the very first step: the next one tells how long one takes
            self._next = step + 1
            return
        wanted_s = interval_s(
            stall_s=stall_s,
            mtbf_s=self._mtbf_s,
            flush_s=slowest_flush_s,
            num_slots=self._num_slots,
            budget=self._every.overhead,
        )
        self._next = step + max(1, math.ceil(wanted_s / step_s))
