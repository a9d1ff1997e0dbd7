"""What a pipeline schedule does in time: simulated, measured, drawn.

A step starts when its rank is free and what it needs has arrived. From these times follow the bubble (idle
over ideal time, as PTD-P section 2.2 defines it) and the picture; in-flight depth needs the order alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import floor

from distrain.core.errors import ConfigError

from .schedules import Op, PipelineSchedule, Step

ACTIVATION, GRADIENT = "activation", "gradient"

Product = tuple[str, int, int]
"""what a step leaves behind for others: ACTIVATION or GRADIENT, of which stage, of which micro-batch"""


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


def draw(picture: PipelineSchedule | Timeline) -> str:
    """One line a rank: the order of a schedule, or a timeline's ticks, with ``.`` for idle, ``-`` for busy.

    A tick is the shortest step, and times are rounded down to ticks. With one stage a rank the row says the
    stage and a step reads ``F1`` (micro-batch 1), otherwise ``F3.1`` (stage 3, micro-batch 1).
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
