"""The door of the planner: lengths in, a checked StepPlan out.

::

    lengths -> problem -> waves: native, in Python, or by FlexSP's programs
            -> groups on slots -> perhaps a timeline without barriers -> plan with its bound

Every plan is at most as long as the best plan of one degree a micro-batch, which is among the candidates.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from distrain.core.errors import MissingDependencyError

from . import native, waves
from .cost import SequenceCost
from .native import Waves
from .problem import StepProblem
from .step_plan import MicroBatch, Schedule, SequenceGroup, StepPlan, step_ms

Solver = Literal["native", "python", "milp"]
Wanted = Literal["auto", "lock-step", "asynchronous"]

_CLOSED = 1e-6
_ASSEMBLY_S_PER_SEQUENCE = 5e-6  # to make a plan of what the search found


def plan_step(
    lengths: Sequence[int],
    *,
    num_slots: int,
    cost: SequenceCost,
    time_limit_s: float | None = None,
    certify_s: float = 0.0,
    seed: int = 0,
    schedule: Wanted = "lock-step",
    solver: Solver = "native",
    build: bool = True,
) -> StepPlan:
    """Micro-batches of groups for one step over ``lengths`` (tokens), on ``num_slots`` devices.

    The same arguments give the same plan, on every machine that is fast enough for ``time_limit_s`` of processor time
    (where the clock cut the search short, the plan's reasons say so); the default limit grows with devices and
    sequences. With ``certify_s`` that many seconds more go into a stronger bound. ``build=False`` never compiles: in a
    job, which has what was built before it. Without the native library the plan is made in Python, and is longer.

    ``schedule="auto"`` takes the shorter of both schedules, for jobs that can run without barriers.

    Raises:
        ConfigError: nothing to plan, lengths that are no token counts.
        InfeasibleError: a sequence does not fit the memory of the widest group.
    """
    start = time.perf_counter()
    problem = StepProblem.of(lengths, num_slots=num_slots, cost=cost)
    if time_limit_s is None:
        time_limit_s = default_time_limit_s(len(lengths), num_slots=num_slots, solver=solver)
    found, reasons = _search(problem, time_limit_s, seed=seed, solver=solver, build=build)
    batches = assemble(problem, found)
    chosen: Schedule = "lock-step"
    if schedule != "lock-step":
        batches, chosen = _without_barriers(problem, batches, wanted=schedule)
    estimated_ms = step_ms(batches, num_slots=num_slots, schedule=chosen)
    if found.exact and chosen == "lock-step":
        bound_ms, proof = estimated_ms, "bound: every plan was looked at"
    else:
        bound_ms, proof = _bound(problem, batches, chosen, estimated_ms, certify_s)
    return StepPlan(
        microbatches=batches,
        num_slots=num_slots,
        schedule=chosen,
        estimated_ms=estimated_ms,
        lower_bound_ms=bound_ms,
        gap=1 - bound_ms / estimated_ms if estimated_ms > 0 else 0.0,
        status="optimal" if estimated_ms <= bound_ms * (1 + _CLOSED) else "feasible",
        seconds=time.perf_counter() - start,
        baselines={"static": found.static_ms, "batch_adaptive": found.adaptive_ms},
        reasons=(*reasons, proof),
    )


def default_time_limit_s(num_sequences: int, *, num_slots: int, solver: Solver = "native") -> float:
    """20 ms for a few nodes, 2 s for a thousand of them or 80,000 sequences; a minute for the programs of FlexSP."""
    return 60.0 if solver == "milp" else min(max(0.02, 25e-6 * max(num_sequences, 8 * num_slots)), 2.0)


def _without_barriers(
    problem: StepProblem, batches: Sequence[MicroBatch], *, wanted: Wanted
) -> tuple[tuple[MicroBatch, ...], Schedule]:
    from .timeline import asynchronous

    seconds = default_time_limit_s(len(problem.lengths), num_slots=problem.num_slots)
    free = asynchronous(problem, batches, seconds=seconds)
    free_ms = step_ms(free, num_slots=problem.num_slots, schedule="asynchronous")
    shorter = free_ms < step_ms(batches, num_slots=problem.num_slots, schedule="lock-step")
    if wanted == "auto" and not shorter:
        return tuple(batches), "lock-step"
    return free, "asynchronous"


def _bound(
    problem: StepProblem,
    batches: Sequence[MicroBatch],
    schedule: Schedule,
    estimated_ms: float,
    seconds: float,
) -> tuple[float, str]:
    """A bound for the schedule, and a sentence on where it comes from."""
    if schedule == "asynchronous":
        from .timeline import asynchronous_bound_ms

        return min(asynchronous_bound_ms(problem), estimated_ms), "bound: work spread evenly over the slots"
    if seconds <= 0:
        return min(problem.area_bound_ms, estimated_ms), "bound: work spread evenly over the slots"
    from .bound import certify

    certificate = certify(
        problem,
        estimated_ms=estimated_ms,
        num_waves=len(batches),
        waves=_waves(problem, batches),
        seconds=seconds,
    )
    how = "to its end" if certificate.closed else "stopped by its time limit"
    return certificate.bound_ms, f"bound: column generation, {certificate.seconds:.1f} s, {how}"


def _waves(problem: StepProblem, batches: Iterable[MicroBatch]) -> Iterable[tuple[float, list[float]]]:
    """Duration without beta1, and lengths, of each micro-batch."""
    lengths = np.empty_like(problem.lengths)
    lengths[problem.order] = problem.lengths
    for groups in batches:
        longest_ms = max(group.estimated_ms for group in groups) - problem.cost.beta1
        yield longest_ms, [float(lengths[member]) for group in groups for member in group.sequences]


def _search(
    problem: StepProblem, limit_s: float, *, seed: int, solver: Solver, build: bool
) -> tuple[Waves, list[str]]:
    seconds = max(limit_s - _ASSEMBLY_S_PER_SEQUENCE * len(problem.lengths), 0.0)
    milliseconds = 1e3 * seconds
    if solver == "native":
        try:
            found = native.search(problem, milliseconds=milliseconds, seed=seed, build=build)
        except MissingDependencyError as error:
            return waves.search(problem, milliseconds=milliseconds), [
                f"planned in Python: {error.problems[0].error}"
            ]
        if found is None:
            raise AssertionError("a sequence that fits the widest group has a plan")
        return found, ["the clock ended the search: another machine may find another plan"] * found.by_clock
    if solver == "milp":
        from . import milp

        return milp.search(problem, seconds=seconds)
    return waves.search(problem, milliseconds=milliseconds), ["planned in Python, as asked"]


def assemble(problem: StepProblem, found: Waves) -> tuple[MicroBatch, ...]:
    """Groups on slots: in each micro-batch the widest first, so that groups lie on multiples of their degree wherever
    degrees divide each other; micro-batches by descending duration."""
    degrees = np.array(problem.degrees)[found.degree]
    order = np.lexsort((found.group, -degrees, found.wave))
    starts = np.flatnonzero(np.diff(found.wave[order], prepend=-1) | np.diff(found.group[order], prepend=-1))
    ms = problem.times[order, found.degree[order]]
    sums = np.add.reduceat(ms, starts) + problem.cost.beta1
    sequences = problem.order[order].tolist()
    batches: dict[int, list[SequenceGroup]] = {}
    slot = 0
    ends = [*starts[1:].tolist(), len(order)]
    rows = zip(
        starts.tolist(),
        ends,
        found.wave[order[starts]].tolist(),
        degrees[order[starts]].tolist(),
        sums.tolist(),
        strict=True,
    )
    for first, end, wave, degree, group_ms in rows:
        groups = batches.get(wave)
        if groups is None:
            groups, slot = batches.setdefault(wave, []), 0
        groups.append(
            SequenceGroup(tuple(range(slot, slot + degree)), tuple(sorted(sequences[first:end])), group_ms)
        )
        slot += degree
    longest = sorted(batches.values(), key=lambda groups: -max(group.estimated_ms for group in groups))
    return tuple(map(tuple, longest))
