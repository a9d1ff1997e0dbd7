"""Pipeline schedules as pure data: which rank runs which step in which order.

A model cut into ``num_ranks * stages_per_rank`` stages trains on ``micro_batches`` micro-batches. A schedule
is one row of steps a rank and nothing else: the runtime interprets it, planners read its bubbles and its
memory off it, tests draw it. ``timeline.py`` simulates and draws what this file builds,
``schedule_checks.py`` judges what it did not build.

Every kind sends micro-batches over a link in the order in which the receiver takes them, for activations and
for gradients apart, so that both ends agree on what comes next without a word: links are plain FIFO queues.
A stage sees its micro-batches in ascending order, so kinds add up gradients alike: they differ in time and
memory, not in the result.

- GPipe (1811.06965): all forwards, then all backwards.
- 1F1B (PipeDream-Flush, 2006.09503): just enough forwards to keep the ranks below busy, then alternate.
- interleaved 1F1B (Megatron PTD-P, 2104.04473, section 2.2): stages placed round robin, so that the pipeline
  fills in steps of 1/v of a rank's work.
- ZBV (Zero Bubble, 2401.10241, section 6): backward split in two, stages placed as a V.

On one rank with one stage every kind is gradient accumulation.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from distrain.core.errors import ConfigError, Problem, raise_if
from distrain.core.vocabulary import Schedule


class Op(StrEnum):
    """What a step computes."""

    FORWARD = "F"
    BACKWARD = "B"
    """gradients of inputs and weights at once"""
    BACKWARD_INPUT = "I"
    """gradients of the inputs only: what the rank below waits for"""
    BACKWARD_WEIGHT = "W"
    """gradients of the weights only: nobody waits for these"""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of one stage on one micro-batch; ``F3.1`` is the forward of stage 3 on micro-batch 1."""

    op: Op
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.op}{self.stage}.{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> "Step":
        """The step that prints as ``text``; ValueError if there is none."""
        stage, _, micro_batch = text[1:].partition(".")
        return cls(Op(text[:1]), int(stage), int(micro_batch))


@dataclass(frozen=True, slots=True)
class PipelineSchedule:
    """The steps of every pipeline rank in order; stage ``s`` lives on rank ``stage_to_rank[s]``."""

    kind: Schedule
    num_ranks: int
    stages_per_rank: int
    micro_batches: int
    steps: tuple[tuple[Step, ...], ...]
    stage_to_rank: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Stages over all ranks."""
        return len(self.stage_to_rank)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages on ``rank``, in the order of the model."""
        return tuple(stage for stage, home in enumerate(self.stage_to_rank) if home == rank)

    def to_json(self) -> str:
        """The schedule as one JSON object whose rows read like ``"F0.0 F0.1 B0.0 B0.1"``."""
        return json.dumps(
            {
                "kind": str(self.kind),
                "num_ranks": self.num_ranks,
                "stages_per_rank": self.stages_per_rank,
                "micro_batches": self.micro_batches,
                "stage_to_rank": self.stage_to_rank,
                "steps": [" ".join(map(str, row)) for row in self.steps],
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> "PipelineSchedule":
        """What ``to_json`` wrote; ConfigError if it cannot be read (``verify`` judges what it says)."""
        try:
            data = json.loads(text)
            return cls(
                kind=Schedule(data["kind"]),
                num_ranks=int(data["num_ranks"]),
                stages_per_rank=int(data["stages_per_rank"]),
                micro_batches=int(data["micro_batches"]),
                steps=tuple(tuple(map(Step.parse, row.split())) for row in data["steps"]),
                stage_to_rank=tuple(map(int, data["stage_to_rank"])),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                "a pipeline schedule cannot be read",
                got=f"{type(error).__name__}: {error}",
                allowed="the JSON that PipelineSchedule.to_json writes",
            ) from error


def build(
    kind: Schedule, *, num_ranks: int, micro_batches: int, stages_per_rank: int = 1
) -> PipelineSchedule:
    """The schedule of ``kind``; ConfigError lists what is impossible.

    Only interleaved leaves ``stages_per_rank`` to the caller. ZBV has two by its nature, except on one rank,
    where there is nothing to hide and the caller may say one.
    """
    raise_if(_problems(kind, num_ranks, micro_batches, stages_per_rank))
    if kind is Schedule.ZBV and num_ranks > 1:
        stages_per_rank = 2
    if num_ranks == 1 and stages_per_rank == 1:
        rows: list[Iterator[Step]] = [_one_f_one_b(0, 1, micro_batches)]
    elif kind is Schedule.GPIPE:
        rows = [_gpipe(rank, micro_batches) for rank in range(num_ranks)]
    elif kind is Schedule.ONE_F_ONE_B:
        rows = [_one_f_one_b(rank, num_ranks, micro_batches) for rank in range(num_ranks)]
    elif kind is Schedule.INTERLEAVED:
        rows = [_interleaved(rank, num_ranks, stages_per_rank, micro_batches) for rank in range(num_ranks)]
    else:
        rows = [_zbv(rank, num_ranks, micro_batches) for rank in range(num_ranks)]
    return PipelineSchedule(
        kind=kind,
        num_ranks=num_ranks,
        stages_per_rank=stages_per_rank,
        micro_batches=micro_batches,
        steps=tuple(tuple(row) for row in rows),
        stage_to_rank=placement(kind, num_ranks=num_ranks, stages_per_rank=stages_per_rank),
    )


def placement(kind: Schedule, *, num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """Rank of every stage: round robin, or down and back up again for ZBV."""
    stages = range(num_ranks * stages_per_rank)
    if kind is Schedule.ZBV:
        return tuple(min(stage, 2 * num_ranks - 1 - stage) for stage in stages)
    return tuple(stage % num_ranks for stage in stages)


def _problems(kind: Schedule, num_ranks: int, micro_batches: int, stages_per_rank: int) -> list[Problem]:
    problems = [
        Problem(f"a pipeline needs a positive number of {name}", got=str(value), allowed="1 and up")
        for name, value in (
            ("ranks", num_ranks),
            ("micro-batches", micro_batches),
            ("stages a rank", stages_per_rank),
        )
        if value < 1
    ]
    if problems:
        return problems
    most = {Schedule.INTERLEAVED: stages_per_rank, Schedule.ZBV: 2}.get(kind, 1)
    if stages_per_rank > most:
        problems.append(
            Problem(
                f"{kind} cannot have {stages_per_rank} stages a rank",
                got=f"stages_per_rank = {stages_per_rank}",
                allowed=f"1 to {most}",
                hint="use interleaved",
            )
        )
    if kind is Schedule.INTERLEAVED and micro_batches % num_ranks:
        problems.append(
            Problem(
                "interleaved needs micro-batches in multiples of the pipeline ranks",
                got=f"micro_batches = {micro_batches}, ranks = {num_ranks}",
                allowed=f"multiples of {num_ranks}",
                hint="use 1f1b or zbv, which take any number",
            )
        )
    return problems


def _gpipe(rank: int, micro_batches: int) -> Iterator[Step]:
    for op in (Op.FORWARD, Op.BACKWARD):
        for micro_batch in range(micro_batches):
            yield Step(op, rank, micro_batch)


def _one_f_one_b(rank: int, num_ranks: int, micro_batches: int) -> Iterator[Step]:
    warmup = min(num_ranks - rank - 1, micro_batches)
    forwards = (Step(Op.FORWARD, rank, index) for index in range(micro_batches))
    backwards = (Step(Op.BACKWARD, rank, index) for index in range(micro_batches))
    yield from _alternate(forwards, backwards, warmup=warmup)


def _interleaved(rank: int, num_ranks: int, stages_per_rank: int, micro_batches: int) -> Iterator[Step]:
    """Groups of ``num_ranks`` micro-batches pass through all stages of the rank before the next group starts.

    Backwards walk the stages from the last. The warm-up covers the passes through all stages but the last
    (``(v - 1) p`` steps) and twice the distance to the last rank: the way down, and the way back.
    """
    total = micro_batches * stages_per_rank
    warmup = min((stages_per_rank - 1) * num_ranks + 2 * (num_ranks - rank - 1), total)

    def step(op: Op, index: int) -> Step:
        group, place = divmod(index, num_ranks * stages_per_rank)
        chunk, offset = divmod(place, num_ranks)
        if op is Op.BACKWARD:
            chunk = stages_per_rank - 1 - chunk
        return Step(op, chunk * num_ranks + rank, group * num_ranks + offset)

    forwards = (step(Op.FORWARD, index) for index in range(total))
    backwards = (step(Op.BACKWARD, index) for index in range(total))
    yield from _alternate(forwards, backwards, warmup=warmup)


def _alternate(forwards: Iterator[Step], backwards: Iterator[Step], *, warmup: int) -> Iterator[Step]:
    """``warmup`` forwards, then one forward and one backward in turn, then the backwards that are left."""
    for _ in range(warmup):
        yield next(forwards)
    for forward in forwards:
        yield forward
        yield next(backwards)
    yield from backwards


def _zbv(rank: int, num_ranks: int, micro_batches: int) -> Iterator[Step]:
    """Zero bubble on a V: rank r holds stage ``down = r`` and stage ``up = 2p - 1 - r``.

    Let F, I and W cost one tick each. Micro-batch 0 reaches (down, r) at tick r and comes back to (up, r) at
    tick ``2p - 1 - r``, which leaves room for ``2 (p - r) - 1`` forwards of `down`. The loss is known on
    rank 0, so the gradient sets out where the activation set out: it reaches (up, r) at tick ``2p + r``,
    after ``2r + 1`` more ticks, filled with forwards of `up` and `down` in turn. By then every rank holds
    ``2p`` half-stage activations, just the ``p`` whole ones of 1F1B's first rank, and from here on an I and
    a W free one for each forward. Until a gradient comes back to `down` these triples run on `up` alone, ``p
    - r`` times: rank r starts them one tick before rank r + 1 and has one more of them, so it ends them two
    ticks later, and that is when rank r + 1 has passed the gradient on. From there the steady state ``F I
    W`` of `down`, ``F I W`` of `up` repeats without an idle tick. When forwards run out the I's go first,
    since others wait for them, and the W's put off fill the end. Rank r thus works from tick r to tick ``6m
    + r`` without a pause: the bubble of ``p - 1`` ticks is only the ranks' different start.

    The phases below are those of ``n = max(m, 2p - 1)`` micro-batches, the fewest that fill the pattern. The
    surplus is left out, and what remains of an order without deadlock cannot deadlock.
    """
    n = max(micro_batches, 2 * num_ranks - 1)
    below = num_ranks - rank
    down, up = rank, 2 * num_ranks - 1 - rank
    f_down, i_down, w_down = ((op, down) for op in (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT))
    f_up, i_up, w_up = ((op, up) for op in (Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT))
    phases = (
        (2 * below - 1, (f_down,)),
        (rank, (f_up, f_down)),
        (below, (f_up, i_up, w_up)),
        (n - 2 * num_ranks + rank + 1, (f_down, i_down, w_down, f_up, i_up, w_up)),
        (below - 1, (i_down, w_down, f_up, i_up, w_up)),
        (rank, (i_down, i_up)),
        (below, (i_down, w_down)),
        (rank, (w_up,)),
        (rank, (w_down,)),
    )
    next_micro_batch: Counter[tuple[Op, int]] = Counter()
    for repeats, pattern in phases:
        for op, stage in pattern * repeats:
            micro_batch = next_micro_batch[op, stage]
            next_micro_batch[op, stage] += 1
            if micro_batch < micro_batches:
                yield Step(op, stage, micro_batch)
