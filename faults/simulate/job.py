"""One job meets its failures: an event loop over failures, between which everything follows by arithmetic.

A failure stops training, takes what was not saved, and starts a recovery: detection, diagnosis, waiting for a node if
no spare is idle, restart, restore. A failure that strikes a recovery begins it anew, with what is lost by then; nodes
lost until training goes on count together against the levels in memory, which are whole again when it does. Failures
of nodes that are not in the job (idle, or in repair) do not touch it. Every second is booked under one cause, so the
causes sum to the horizon.

A corruption is found some time after its onset. Training goes on meanwhile, for nothing: the job returns to the newest
save from before the onset. It finds nothing if another failure has made it return that far already.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from heapq import heappop, heappush

import numpy as np

from .failures import Failures, Shows
from .levels import START, Level, Save, Stretch, Survives


class Cause(StrEnum):
    """What the job's time goes to."""

    TRAINING = "training"
    STALL = "stall"
    LOST_WORK = "lost_work"
    DETECT = "detect"
    DIAGNOSE = "diagnose"
    WAIT = "wait"
    RESTART = "restart"
    RESTORE = "restore"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How long the steps of a recovery take."""

    crash_detect_s: float
    hang_detect_s: float
    corruption_detect_s: float
    diagnose_s: float
    restart_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job and its policy. Nodes are numbered; the first ``num_nodes`` begin in the job, the spares follow."""

    num_nodes: int
    num_spares: int
    horizon_s: float
    interval_s: float
    stall_s: float
    levels: tuple[Level, ...]
    recovery: Recovery


@dataclass(frozen=True, slots=True)
class Span:
    """What the job did in between two times."""

    start_s: float
    end_s: float
    cause: Cause


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the job."""

    horizon_s: float
    seconds: dict[Cause, float]
    """sums to ``horizon_s``"""
    failures: dict[str, int]
    """by class, those that struck the job"""
    seconds_by_class: dict[str, dict[Cause, float]]
    interruptions: int
    """times that training was stopped; fewer than failures, which may strike a recovery"""
    saves: int
    spans: tuple[Span, ...]
    num_events: int
    """failures and changes of what the job does, each of which the loop handled one by one"""

    @property
    def ettr(self) -> float:
        """Effective training time ratio: useful training over elapsed time."""
        return self.seconds[Cause.TRAINING] / self.horizon_s


def replay(job: Job, failures: Failures) -> Outcome:
    """Run the job through ``failures`` until its horizon."""
    run = _Run(job, failures)
    for hit in _in_order(job, failures):
        if hit.t_s >= job.horizon_s:
            break
        run.hit(hit)
    run.advance(job.horizon_s)
    return run.outcome()


@dataclass(frozen=True, slots=True)
class _Hit:
    """A failure as the job meets it: corruption when it is found."""

    t_s: float
    onset_s: float
    node: int
    kind: int
    repair_s: float


def _in_order(job: Job, failures: Failures) -> Iterator[_Hit]:
    late = [each.shows is Shows.CORRUPTION for each in failures.classes]
    t_s = failures.t_s + np.where(np.array(late)[failures.kind], job.recovery.corruption_detect_s, 0.0)
    order = np.argsort(t_s, kind="stable")
    columns = (t_s, failures.t_s, failures.node, failures.kind, failures.repair_s)
    return map(_Hit, *(column[order].tolist() for column in columns))


class _Run:
    """The state of one replay."""

    def __init__(self, job: Job, failures: Failures) -> None:
        self._job, self._classes = job, failures.classes
        self._now_s = self._ready_s = 0.0
        self._state = self._base = START
        self._phases: tuple[tuple[Cause, float], ...] = ()
        self._blamed = ""
        self._held = [START] * len(job.levels)
        self._lost: set[int] = set()
        self._places = dict(enumerate(range(job.num_nodes)))
        self._idle = [(0.0, node) for node in range(job.num_nodes, job.num_nodes + job.num_spares)]
        self._free_s: defaultdict[int, float] = defaultdict(float)
        self._nodes_ready_s = 0.0
        self._stretches: list[Stretch] = []
        self._spans: list[Span] = []
        self._by_class: defaultdict[str, defaultdict[Cause, float]] = defaultdict(lambda: defaultdict(float))
        self._failures: Counter[str] = Counter()
        self._interruptions = 0

    def hit(self, hit: _Hit) -> None:
        """A failure strikes, the job or a node that it does not use."""
        kind = self._classes[hit.kind]
        if hit.t_s < self._free_s[hit.node]:
            return
        if hit.node not in self._places:
            if hit.repair_s:
                self._repair(hit.node, hit.t_s + hit.repair_s)
            return
        down = hit.t_s < self._ready_s
        if (kind.shows is Shows.PLANNED and down) or (
            kind.shows is Shows.CORRUPTION and self._is_clean(hit.onset_s)
        ):
            return
        self.advance(hit.t_s)
        self._failures[kind.name] += 1
        self._interruptions += not down
        self._blamed = kind.name
        if hit.repair_s:
            self._replace(hit.node, hit.t_s + hit.repair_s)
        self._recover(kind.shows, hit.onset_s)

    def advance(self, until_s: float) -> None:
        """Book what happens until then: what is left of a recovery, then training."""
        for cause, seconds in self._phases:
            self._book(cause, min(self._now_s + seconds, until_s))
        self._phases = ()
        if self._now_s < until_s:
            self._train(until_s)

    def outcome(self) -> Outcome:
        """The books, closed."""
        stretches = self._stretches
        seconds = {
            cause: sum(booked.get(cause, 0.0) for booked in self._by_class.values()) for cause in Cause
        }
        seconds[Cause.STALL] += sum(each.end_s - each.start_s - each.work_s for each in stretches)
        seconds[Cause.TRAINING] = self._state.work_s
        return Outcome(
            horizon_s=self._job.horizon_s,
            seconds=seconds,
            failures=dict(self._failures),
            seconds_by_class={name: dict(booked) for name, booked in self._by_class.items()},
            interruptions=self._interruptions,
            saves=sum(each.num_saves for each in stretches),
            spans=tuple(self._spans),
            num_events=sum(self._failures.values()) + len(self._spans),
        )

    def _book(self, cause: Cause, until_s: float) -> None:
        if self._now_s < until_s:
            self._spans.append(Span(self._now_s, until_s, cause))
            self._by_class[self._blamed][cause] += until_s - self._now_s
            self._now_s = until_s

    def _train(self, until_s: float) -> None:
        """Levels in memory are whole again; then a stretch of training and saving."""
        job = self._job
        self._lost.clear()
        stretch = Stretch(self._now_s, until_s, self._base, job.interval_s, job.stall_s)
        for index, level in enumerate(job.levels):
            if level.survives is not Survives.ALL:
                self._held[index] = self._base
            self._held[index] = stretch.newest(level, taken_by_s=until_s) or self._held[index]
        self._state = Save(self._base.work_s + stretch.work_s, self._base.number + stretch.num_saves, until_s)
        self._stretches.append(stretch)
        self._spans.append(Span(self._now_s, until_s, Cause.TRAINING))
        self._now_s = until_s

    def _replace(self, node: int, free_s: float) -> None:
        """The node leaves, and the idle one that is free first takes its place: itself, if there is no other."""
        place = self._places.pop(node)
        self._repair(node, free_s)
        ready_s, chosen = heappop(self._idle)
        while ready_s != self._free_s[chosen]:  # it failed while it was idle, and waits under a later time
            ready_s, chosen = heappop(self._idle)
        self._places[chosen] = place
        self._lost.add(place)
        self._nodes_ready_s = max(self._nodes_ready_s, ready_s)

    def _repair(self, node: int, free_s: float) -> None:
        self._free_s[node] = free_s
        heappush(self._idle, (free_s, node))

    def _recover(self, shows: Shows, onset_s: float) -> None:
        """Choose the save to continue from, write off what it lacks, and lay out the way back."""
        job, times = self._job, self._job.recovery
        found: list[tuple[Cause, float]] = []
        if shows is Shows.PLANNED:
            found = [(Cause.STALL, job.stall_s)]
            self._held = [self._state] * len(job.levels)
        elif shows is Shows.CORRUPTION:
            found = [(Cause.DIAGNOSE, times.diagnose_s)]
            save = self._newest_before(onset_s)
            self._held = [save if level.survives is Survives.ALL else START for level in job.levels]
        else:
            detect_s = times.hang_detect_s if shows is Shows.HANG else times.crash_detect_s
            found = [(Cause.DETECT, detect_s), (Cause.DIAGNOSE, times.diagnose_s)]
        self._base, restore_s = self._best_save()
        self._by_class[self._blamed][Cause.LOST_WORK] += self._state.work_s - self._base.work_s
        self._state = self._base
        known_s = self._now_s + sum(seconds for _, seconds in found)
        wait_s = max(0.0, self._nodes_ready_s - known_s)
        back = (Cause.WAIT, wait_s), (Cause.RESTART, times.restart_s), (Cause.RESTORE, restore_s)
        self._phases = (*found, *back)
        self._ready_s = self._now_s + sum(seconds for _, seconds in self._phases)

    def _best_save(self) -> tuple[Save, float]:
        """The newest save that is left, from the level that restores it fastest."""
        left = [
            (save, level.restore_s)
            for save, level in zip(self._held, self._job.levels, strict=True)
            if level.outlives(self._lost)
        ]
        return max(left, key=lambda pair: (pair[0].work_s, -pair[1]), default=(START, 0.0))

    def _is_clean(self, onset_s: float) -> bool:
        """Whether the job has, since the onset, gone on with a save from before it."""
        later = ((each.start_s, each.base) for each in self._stretches)
        return any(
            start_s > onset_s and base.taken_s <= onset_s
            for start_s, base in (*later, (self._ready_s, self._base))
        )

    def _newest_before(self, onset_s: float) -> Save:
        """The newest save on a level that survives everything, and so keeps more than the last one."""
        for stretch in reversed(self._stretches):
            for level in self._job.levels:
                if level.survives is Survives.ALL and stretch.start_s <= onset_s:
                    save = stretch.newest(level, taken_by_s=onset_s)
                    if save is not None:
                        return save
        return START
