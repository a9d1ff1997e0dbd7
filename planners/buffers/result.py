"""What a planner answers: offsets, and how good they are proven to be."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """What is known when a planner stops."""

    OPTIMAL = "optimal"
    """no plan has a lower peak"""
    FEASIBLE = "feasible"
    """a valid plan; a lower peak is not excluded, or was not asked for"""
    INFEASIBLE = "infeasible"
    """proven: nothing fits under the capacity"""
    UNDECIDED = "undecided"
    """nothing that fits under the capacity was found in time, and nothing is proven"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferPlan:
    """Offsets in the order of the buffers; without a plan ``offsets`` is empty and ``peak`` is None."""

    offsets: tuple[int, ...]
    peak: int | None
    lower_bound: int
    """no plan has a lower peak than this"""
    status: Status
    proof: str
    """what stands behind the status and the bound"""
    solver: str
    """which part found the plan, or the proof"""
    seconds: float
    notes: tuple[str, ...] = ()
    """what was lacking"""

    @property
    def gap(self) -> float | None:
        """How far the peak may be above the best one, relative to the bound; None without a plan."""
        if self.peak is None:
            return None
        return (self.peak - self.lower_bound) / self.lower_bound if self.lower_bound else 0.0

    def to_dict(self) -> Mapping[str, object]:
        """The plan without its offsets, as JSON takes it."""
        return {
            "peak": self.peak,
            "lower_bound": self.lower_bound,
            "gap": self.gap,
            "status": str(self.status),
            "proof": self.proof,
            "solver": self.solver,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }
