"""What became of a plan: how many requests followed it, why the others did not, and what memory it took."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True, slots=True)
class AllocationReport:
    """Counts since the plan was put in place. The counters stand in the order of ``plan_core.hpp``."""

    hits: int
    """served from the arena, at the planned address"""
    unplanned: int
    """expected, but the plan has no place for them: blocks that outlive the step"""
    extra: int
    """not what the plan expects: another size, one too many, or while it has lost its way"""
    occupied: int
    """expected, but somebody still lives in their place"""
    elsewhere: int
    """from another thread or stream than the plan's"""
    skipped: int
    """what the plan expected and a finished step did not ask for"""
    resyncs: int
    """times that the plan was found again after it had been left"""
    steps: int
    """finished steps"""
    foreign_frees: int
    """blocks of the arena that another thread or stream gave back"""
    live_blocks: int
    """of the arena, at the moment of the report"""
    live_bytes: int
    top_bytes: int
    """the highest end of a block of the arena so far: no more than the plan's peak"""
    fallback_bytes: int
    """of the allocator beneath, alive at the moment, without small blocks and those from before the plan"""
    fallback_peak_bytes: int
    """the most of them at once"""
    peak_live_bytes: int
    """the most bytes alive at once, in the arena and beneath"""
    arena_bytes: int = 0
    """what the plan reserves"""

    @classmethod
    def of(cls, counts: Sequence[int], *, arena_bytes: int = 0) -> Self:
        """The report that native code has counted."""
        names = [field.name for field in fields(cls)[:-1]]
        return cls(**dict(zip(names, counts, strict=True)), arena_bytes=arena_bytes)

    @classmethod
    def num_counts(cls) -> int:
        """How many numbers native code counts."""
        return len(fields(cls)) - 1

    @property
    def misses(self) -> int:
        """Requests that the plan should have served, and did not."""
        return self.extra + self.occupied + self.elsewhere

    @property
    def hit_rate(self) -> float:
        """Share of all large requests that came from the arena; 1 if there were none."""
        requests = self.hits + self.unplanned + self.misses
        return self.hits / requests if requests else 1.0

    @property
    def peak_bytes(self) -> int:
        """What memory was needed at most: all of the arena, and large blocks beneath."""
        return self.arena_bytes + self.fallback_peak_bytes

    def __str__(self) -> str:
        reasons = ", ".join(
            f"{getattr(self, name)} {name}"
            for name in ("unplanned", "extra", "occupied", "elsewhere", "skipped")
            if getattr(self, name)
        )
        return (
            f"{self.hits} of {self.hits + self.unplanned + self.misses} large requests from the arena of "
            f"{self.arena_bytes / 2**20:.1f} MiB, {self.fallback_peak_bytes / 2**20:.1f} MiB beside it"
            + (f" ({reasons})" if reasons else "")
        )
