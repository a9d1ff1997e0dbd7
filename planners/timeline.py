"""What a pipeline schedule does in time: simulated, measured, checked, drawn.

A step starts when its rank is free and what it needs has arrived. From these times follow the bubble (idle over
ideal time, as PTD-P section 2.2 defines it) and the picture; in-flight depth and the checks need the order alone.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import floor

from distrain.core.errors import ConfigError

from .schedules import Op, PipelineSchedule, Step

ACTIVATION, GRADIENT = "activation", "gradient"

Product = tuple[str, int, int]
"""what a step leaves behind for others: ACTIVATION or GRADIENT, of which stage, of which micro-batch"""

LinkOrders = dict[tuple[int, int, str], list[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Start and end of every step of ``schedule``, in the unit of the costs that were simulated."""

    schedule: PipelineSchedule
    start: tuple[tuple[float, ...], ...]
    end: tuple[tuple[float, ...], ...]

    @property
    def makespan(self) -> float:
        """Time until the last rank is done."""
        return max((row[-1] for row in self.end if row), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank computes."""
        rows = zip(self.start, self.end, strict=True)
        return tuple(sum(b - a for a, b in zip(start, end, strict=True)) for start, end in rows)


def simulate(
    schedule: PipelineSchedule,
    *,
    forward: float = 1.0,
    backward_input: float = 1.0,
    backward_weight: float = 1.0,
    p2p: float = 0.0,
) -> Timeline:
    """Run ``schedule`` with these costs of one stage; ``p2p`` is paid on every hop between two ranks.

    Raises ConfigError if the schedule deadlocks, naming the step at which every rank waits.
    """
    cost = {
        Op.FORWARD: forward,
        Op.BACKWARD: backward_input + backward_weight,
        Op.BACKWARD_INPUT: backward_input,
        Op.BACKWARD_WEIGHT: backward_weight,
    }
    home = schedule.stage_to_rank
    done: dict[Product, float] = {}
    start: list[list[float]] = [[] for _ in schedule.steps]
    end: list[list[float]] = [[] for _ in schedule.steps]

    def advance(rank: int) -> int:
        """Run what ``rank`` can run now; the number of steps."""
        first = len(end[rank])
        for step in schedule.steps[rank][first:]:
            needs = tuple(_needs(schedule, step))
            if not all(need in done for need in needs):
                break
            arrivals = (done[need] + (p2p if home[need[1]] != rank else 0.0) for need in needs)
            start[rank].append(max([end[rank][-1] if end[rank] else 0.0, *arrivals]))
            end[rank].append(start[rank][-1] + cost[step.op])
            done[_product(step)] = end[rank][-1]
        return len(end[rank]) - first

    while sum(advance(rank) for rank in range(schedule.num_ranks)):
        pass
    waiting = [
        f"rank {rank} before {row[len(end[rank])]}"
        for rank, row in enumerate(schedule.steps)
        if len(end[rank]) < len(row)
    ]
    if waiting:
        raise ConfigError("the pipeline schedule deadlocks", got="waiting: " + ", ".join(waiting))
    return Timeline(schedule, tuple(map(tuple, start)), tuple(map(tuple, end)))


def bubble_fraction(timeline: Timeline) -> float:
    """Idle over ideal time: ``(makespan - busy) / busy`` of the busiest rank; 0 if nothing costs anything."""
    ideal = max(timeline.busy, default=0.0)
    return (timeline.makespan - ideal) / ideal if ideal else 0.0


def in_flight(schedule: PipelineSchedule) -> tuple[int, ...]:
    """Most activations alive on each rank at once, each of one stage and one micro-batch.

    An activation lives from its forward to the step that computes gradients of weights.
    """
    peaks = []
    for row in schedule.steps:
        live = peak = 0
        for step in row:
            live += {Op.FORWARD: 1, Op.BACKWARD_INPUT: 0}.get(step.op, -1)
            peak = max(peak, live)
        peaks.append(peak)
    return tuple(peaks)


def verify(schedule: PipelineSchedule) -> list[str]:
    """Everything that is wrong with ``schedule``, in words; an empty list if it can run."""
    problems = _shape_problems(schedule)
    if problems:
        return problems
    problems = [*_coverage_problems(schedule), *_order_problems(schedule), *_link_problems(schedule)]
    if not problems:
        try:
            simulate(schedule)
        except ConfigError as error:
            problems.append(f"{error.problems[0].error}; {error.problems[0].got}")
    return problems


def link_orders(schedule: PipelineSchedule) -> tuple[LinkOrders, LinkOrders]:
    """What each link carries, in the order in which its sender makes it and in the one its receiver takes it.

    The keys are (sender, receiver, ACTIVATION or GRADIENT), the entries (sending stage, micro-batch). Two stages of
    one rank have no link between them.
    """
    home, last = schedule.stage_to_rank, schedule.num_stages - 1
    sent: LinkOrders = defaultdict(list)
    taken: LinkOrders = defaultdict(list)
    for rank, row in enumerate(schedule.steps):
        for step in row:
            stage, index = step.stage, step.micro_batch
            if step.op is Op.BACKWARD_WEIGHT:
                continue
            kind, onward = (ACTIVATION, 1) if step.op is Op.FORWARD else (GRADIENT, -1)
            target, source = stage + onward, stage - onward
            if 0 <= target <= last and home[target] != rank:
                sent[rank, home[target], kind].append((stage, index))
            if 0 <= source <= last and home[source] != rank:
                taken[home[source], rank, kind].append((source, index))
    return sent, taken


def draw(picture: PipelineSchedule | Timeline) -> str:
    """One line a rank. A schedule shows its order; a timeline one column a tick, ``.`` idle, ``-`` still busy.

    A tick is the shortest step, and times are rounded down to ticks. With one stage a rank the row says the stage
    and a step reads ``F1`` (micro-batch 1), otherwise ``F3.1`` (stage 3, micro-batch 1).
    """
    schedule = picture.schedule if isinstance(picture, Timeline) else picture
    rows = [[_label(schedule, step) for step in row] for row in schedule.steps]
    if isinstance(picture, Timeline):
        rows = [_ticks(picture, rank, labels) for rank, labels in enumerate(rows)]
    width = max((len(cell) for row in rows for cell in row), default=0)
    return "\n".join(" ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)


def _label(schedule: PipelineSchedule, step: Step) -> str:
    return f"{step.op}{step.micro_batch}" if schedule.stages_per_rank == 1 else str(step)


def _ticks(timeline: Timeline, rank: int, labels: list[str]) -> list[str]:
    starts, ends = chain(*timeline.start), chain(*timeline.end)
    tick = min((b - a for a, b in zip(starts, ends, strict=True) if b > a), default=1.0)

    def column(time: float) -> int:
        return floor(time / tick + 1e-6)

    cells = ["."] * column(timeline.makespan)
    for label, start, end in zip(labels, timeline.start[rank], timeline.end[rank], strict=True):
        first = column(start)
        last = max(first + 1, column(end))
        cells[first:last] = [label, *["-"] * (last - first - 1)]
    return cells


def _product(step: Step) -> Product:
    """What ``step`` makes. Nobody needs a weight gradient, but I and W must not go by one name."""
    kind = {Op.FORWARD: ACTIVATION, Op.BACKWARD_WEIGHT: "weight gradient"}.get(step.op, GRADIENT)
    return kind, step.stage, step.micro_batch


def _needs(schedule: PipelineSchedule, step: Step) -> Iterator[Product]:
    """What must be there before ``step`` can start."""
    stage, micro_batch = step.stage, step.micro_batch
    if step.op is Op.FORWARD:
        if stage:
            yield ACTIVATION, stage - 1, micro_batch
    elif step.op is Op.BACKWARD_WEIGHT:
        yield GRADIENT, stage, micro_batch
    else:
        yield ACTIVATION, stage, micro_batch
        if stage + 1 < schedule.num_stages:
            yield GRADIENT, stage + 1, micro_batch


def _shape_problems(schedule: PipelineSchedule) -> list[str]:
    p, v = schedule.num_ranks, schedule.stages_per_rank
    problems = []
    if len(schedule.steps) != p:
        problems.append(f"{len(schedule.steps)} rows of steps for {p} ranks")
    if sorted(schedule.stage_to_rank) != sorted(list(range(p)) * v):
        problems.append(f"stage_to_rank {schedule.stage_to_rank} does not give {p} ranks {v} stages each")
    return problems


def _coverage_problems(schedule: PipelineSchedule) -> list[str]:
    """Every stage on its rank, every micro-batch there once forward and once backward, whole or in two parts."""
    problems = []
    todo = {(stage, index) for stage in range(schedule.num_stages) for index in range(schedule.micro_batches)}
    seen: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for rank, row in enumerate(schedule.steps):
        for step in row:
            if (step.stage, step.micro_batch) not in todo:
                problems.append(f"{step} on rank {rank}: no such stage or micro-batch")
            elif schedule.stage_to_rank[step.stage] != rank:
                problems.append(f"{step} runs on rank {rank}, its stage lives elsewhere")
            seen[step.stage, step.micro_batch].append(str(step.op))
    for stage, index in sorted(todo):
        ops = sorted(seen[stage, index])
        if ops not in (["B", "F"], ["F", "I", "W"]):
            ran = " ".join(ops) or "nothing"
            problems.append(f"stage {stage}, micro-batch {index}: ran {ran}, not F B or F I W")
    return problems


def _order_problems(schedule: PipelineSchedule) -> list[str]:
    """Within a rank: forward before backward, input before weight gradients."""
    rows: list[dict[tuple[Op, int, int], int]] = [
        {(step.op, step.stage, step.micro_batch): place for place, step in enumerate(row)}
        for row in schedule.steps
    ]
    first = {Op.BACKWARD: Op.FORWARD, Op.BACKWARD_INPUT: Op.FORWARD, Op.BACKWARD_WEIGHT: Op.BACKWARD_INPUT}
    return [
        f"{Step(op, stage, index)} on rank {rank} comes before {Step(first[op], stage, index)}"
        for rank, places in enumerate(rows)
        for (op, stage, index), place in places.items()
        if op in first and places.get((first[op], stage, index), -1) > place
    ]


def _link_problems(schedule: PipelineSchedule) -> list[str]:
    """Both ends of every directed link take the same order, for activations and for gradients apart."""
    sent, taken = link_orders(schedule)
    return [
        f"{kind}s from rank {source} to {target}: "
        f"sent as {_pairs(sent[source, target, kind])}, taken as {_pairs(taken[source, target, kind])}"
        for source, target, kind in sorted(sent.keys() | taken.keys())
        if sent[source, target, kind] != taken[source, target, kind]
    ]


def _pairs(order: list[tuple[int, int]]) -> str:
    return " ".join(f"{stage}.{micro_batch}" for stage, micro_batch in order) or "nothing"
