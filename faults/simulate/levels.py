"""Where saves live, which failures each place survives, and which save is the newest at a given time.

Saves are never events: undisturbed training saves every ``interval_s`` and stalls for ``stall_s``, so what a stretch of
it has done and saved follows by division. That is why a month with 10,000 saves costs no more than its failures.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum


class Survives(StrEnum):
    """What a save at a level survives."""

    PROCESS = "process"
    """processes that die, not the loss of a node: a snapshot in the node's memory"""
    NODES = "nodes"
    """up to ``max_lost`` lost nodes in each group: erasure-coded memory"""
    ALL = "all"
    """everything: shared storage"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One place of saves."""

    name: str
    survives: Survives
    restore_s: float
    every: int = 1
    """takes each so-many-th save"""
    delay_s: float = 0.0
    """from the end of the stall until a save can be restored from here"""
    group_nodes: int = 8
    max_lost: int = 1

    def outlives(self, lost: Collection[int]) -> bool:
        """Whether the saves here are still there after the nodes at these positions of the job were lost."""
        if self.survives is Survives.ALL:
            return True
        if self.survives is Survives.PROCESS:
            return not lost
        return max(Counter(place // self.group_nodes for place in lost).values(), default=0) <= self.max_lost


@dataclass(frozen=True, slots=True)
class Save:
    """A state that training can continue from."""

    work_s: float
    """training that it holds"""
    number: int
    """saves before it, since the job began"""
    taken_s: float


START = Save(0.0, 0, 0.0)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Undisturbed training between two times, begun with ``base``."""

    start_s: float
    end_s: float
    base: Save
    interval_s: float
    stall_s: float

    @property
    def num_saves(self) -> int:
        """Saves that were finished."""
        return int((self.end_s - self.start_s) // self._cycle_s)

    @property
    def work_s(self) -> float:
        """Time spent training; the rest are stalls."""
        rest_s = self.end_s - self.start_s - self.num_saves * self._cycle_s
        return self.num_saves * self.interval_s + min(rest_s, self.interval_s)

    def newest(self, level: Level, *, taken_by_s: float) -> Save | None:
        """The newest save that was taken by then and had reached ``level`` before the stretch ended."""
        until_s = min(taken_by_s, self.end_s - level.delay_s)
        k = int((until_s - self.start_s) // self._cycle_s)
        k -= (self.base.number + k) % level.every
        if k < 1:
            return None
        work_s = self.base.work_s + k * self.interval_s
        return Save(work_s, self.base.number + k, self.start_s + k * self._cycle_s)

    @property
    def _cycle_s(self) -> float:
        return self.interval_s + self.stall_s
