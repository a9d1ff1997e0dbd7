"""A job, its failures and its policy as one TOML file; every value may be left out.

The defaults are Llama 3 405B (arXiv 2407.21783) over 30 days. Published by it: 16,384 GPUs that train in a cluster of
24,576, the failures, storage that sustains 2 TB/s, and 1 MB to 4 GB a GPU in a checkpoint. Derived: a save writes 14
bytes a parameter at that speed, and training waits for all of it; a restore reads 4 GB a GPU. Not published by it: the
times of a recovery. They are C4's after its automation (arXiv 2406.04594, December 2023: 0.05 % of a month for
detection, 0.73 % for diagnosis and isolation, 0.15 % for the start, assuming the 40 crashes a month of its job), which
agrees with MegaScale's bound of ten minutes to detect and diagnose; a hang takes the ten minutes after which torch
gives up a collective. Assumed: the interval is the best one, repairs take what InfiniteHBD's data say, and a silent
corruption stays unnoticed for an hour.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from .closed_forms import best_interval_s
from .failures import DAY_S, FailureClass, FailureProcess, Failures, draw
from .job import Job, Recovery
from .levels import Level, Survives
from .mixes import MIXES
from .trace import read_trace

AUTO = "auto"
SHORTEST_S = 1.0
"""between two saves: no step of a job that needs this simulation is shorter"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSection:
    """How large and how long."""

    gpus: int = 16_384
    gpus_per_node: int = 8
    spare_nodes: int = 1024
    days: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FailuresSection:
    """What fails: a mix, classes of one's own instead of it, or a trace instead of both."""

    mix: str = "llama3"
    classes: tuple[FailureClass, ...] = ()
    trace: str = ""
    scale: float = 1.0
    """failures for each one that the mix or the classes have"""
    burstiness: float = 1.0
    frailty: float = 0.0
    correlated: float = 0.0
    rack_nodes: int = 8
    repair_median_s: float = 0.85 * DAY_S
    repair_sigma: float = 2.13


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSection:
    """What is saved, how often and where."""

    interval_s: float | str = AUTO
    """training between two saves; auto: what is best for the stall and the rate of the failures"""
    stall_s: float = 405e9 * 14 / 2e12
    levels: tuple[Level, ...] = (Level(name="storage", survives=Survives.ALL, restore_s=4e9 * 16_384 / 2e12),)


C4_AUTOMATED = Recovery(
    crash_detect_s=32.0,
    hang_detect_s=600.0,
    corruption_detect_s=3600.0,
    diagnose_s=473.0,
    restart_s=97.0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All that a simulation needs but the seed."""

    job: JobSection = JobSection()
    failures: FailuresSection = FailuresSection()
    recovery: Recovery = C4_AUTOMATED
    checkpoint: CheckpointSection = CheckpointSection()

    @property
    def num_nodes(self) -> int:
        """Nodes in the job."""
        return self.job.gpus // self.job.gpus_per_node

    @property
    def horizon_s(self) -> float:
        """Seconds simulated."""
        return self.job.days * DAY_S

    @property
    def classes(self) -> tuple[FailureClass, ...]:
        """Classes of failures, at the rates that are drawn."""
        given = self.failures.classes or MIXES[self.failures.mix]
        scale = self.failures.scale
        return tuple(replace(each, per_1000_node_days=scale * each.per_1000_node_days) for each in given)

    def failures_of(self, seed: int) -> Failures:
        """What strikes nodes and spares; a trace is the same for every seed.

        Raises:
            ConfigError: the trace cannot be read.
        """
        section, total = self.failures, self.num_nodes + self.job.spare_nodes
        if section.trace:
            path = Path(section.trace)
            return read_trace(path, known=self.classes, num_nodes=total, horizon_s=self.horizon_s)
        process = FailureProcess(
            classes=self.classes,
            burstiness=section.burstiness,
            frailty=section.frailty,
            correlated=section.correlated,
            rack_nodes=section.rack_nodes,
            repair_median_s=section.repair_median_s,
            repair_sigma=section.repair_sigma,
        )
        return draw(process, num_nodes=total, horizon_s=self.horizon_s, seed=seed)

    def mtbf_s(self, failures: Failures) -> float:
        """Mean time between failures of the job; the horizon if none is to be expected in it."""
        if self.failures.trace:
            rate = int((failures.node < self.num_nodes).sum()) / self.horizon_s
        else:
            rate = sum(each.per_1000_node_days for each in self.classes) / 1000 / DAY_S * self.num_nodes
        return min(1 / rate, self.horizon_s) if rate else self.horizon_s

    @property
    def shortest_interval_s(self) -> float:
        """Saves may not come faster than each level takes them."""
        return max(SHORTEST_S, *(level.delay_s / level.every for level in self.checkpoint.levels), 0.0)

    def interval_s(self, failures: Failures) -> float:
        """The interval that is set, or with auto the best one of the closed form that the levels can follow."""
        if not isinstance(self.checkpoint.interval_s, str):
            return self.checkpoint.interval_s
        best_s = best_interval_s(stall_s=self.checkpoint.stall_s, mtbf_s=self.mtbf_s(failures))
        return max(best_s, self.shortest_interval_s)

    def with_auto(self) -> "Scenario":
        """The same with the interval left to the closed form."""
        return replace(self, checkpoint=replace(self.checkpoint, interval_s=AUTO))

    def policy(self, interval_s: float) -> Job:
        """The job under one interval."""
        return Job(
            num_nodes=self.num_nodes,
            num_spares=self.job.spare_nodes,
            horizon_s=self.horizon_s,
            interval_s=interval_s,
            stall_s=self.checkpoint.stall_s,
            levels=self.checkpoint.levels,
            recovery=self.recovery,
        )
