"""Can this pipeline schedule run? What ``build`` makes can; a schedule read from a file is judged here.

Deadlock is tried out by simulation. The order on links is a condition of its own: the runtime's links are
FIFO queues without labels, so what a sender sends first its receiver must take first.
"""

from collections import defaultdict

from distrain.core.errors import ConfigError

from .schedules import Op, PipelineSchedule, Step
from .timeline import ACTIVATION, GRADIENT, simulate

LinkOrders = dict[tuple[int, int, str], list[tuple[int, int]]]


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

    The keys are (sender, receiver, ACTIVATION or GRADIENT), the entries (sending stage, micro-batch). Two
    stages of one rank have no link between them.
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


def _shape_problems(schedule: PipelineSchedule) -> list[str]:
    p, v = schedule.num_ranks, schedule.stages_per_rank
    problems = []
    if len(schedule.steps) != p:
        problems.append(f"{len(schedule.steps)} rows of steps for {p} ranks")
    if sorted(schedule.stage_to_rank) != sorted(list(range(p)) * v):
        problems.append(f"stage_to_rank {schedule.stage_to_rank} does not give {p} ranks {v} stages each")
    return problems


def _coverage_problems(schedule: PipelineSchedule) -> list[str]:
    """Every stage on its rank, every micro-batch there once forward and once backward, whole or halved."""
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
