"""MEMO's two levels (section 4.2): plan one pass of a layer, then the model as if each pass were one buffer.

A *pass* is the forward or the backward of one layer, a stretch of time. Buffers that live and die inside a pass are
planned alone, once for all passes that look alike: so thousands of buffers become a few, and all layers use the same
addresses. Then a pseudo buffer of the pass's peak stands for them, among the buffers that outlive a pass::

    level 1   [layer forward: 12 buffers] -> 3 GiB      [layer backward: 40 buffers] -> 8 GiB
    level 2   embedding, 3 GiB, 3 GiB, ..., head, 8 GiB, 8 GiB, ...

What that costs is not free of charge: bytes that a pass does not use at one moment are closed to others. MEMO does not
say how much that is; here the plan is held against the flat one's bound.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from distrain.core.errors import Problem as Mistake
from distrain.core.errors import raise_if

from .bounds import max_live
from .engine import Engine
from .planner import solve
from .problem import Buffer, check
from .result import BufferPlan, Status
from .validate import violations

Pass = tuple[int, int]
"""start and end of one layer's forward or backward"""


@dataclass(frozen=True, slots=True)
class Levels:
    """A plan in two levels."""

    plan: BufferPlan
    """of all buffers; ``lower_bound`` and ``gap`` are those of the flat problem"""
    passes: tuple[BufferPlan, ...]
    """level 1: one plan for each kind of pass"""
    model: BufferPlan
    """level 2: pseudo buffers and those that outlive a pass"""

    @property
    def loss(self) -> float:
        """How much higher than the flat bound the peak is, relative to it: what two levels cost at most."""
        return self.plan.gap or 0.0


def solve_by_layers(
    buffers: Sequence[Buffer],
    passes: Sequence[Pass],
    *,
    time_limit_s: float = 60.0,
    seed: int = 0,
    engine: Engine | None = None,
) -> Levels:
    """Plan ``buffers`` of which ``passes`` are the layers' passes, in the order of time and without overlap.

    Raises ConfigError that lists what is wrong with the buffers or the passes.
    """
    check(buffers)
    _check_passes(passes)
    begin = time.monotonic()
    inside = _members(buffers, passes)
    kinds: dict[tuple[tuple[int, int, int], ...], BufferPlan] = {}
    offsets = [0] * len(buffers)
    chosen: list[BufferPlan] = []
    for (start, _), members in zip(passes, inside, strict=True):
        moved = [
            Buffer(
                str(place), buffers[index].lower - start, buffers[index].upper - start, buffers[index].size
            )
            for place, index in enumerate(members)
        ]
        kind = tuple((each.lower, each.upper, each.size) for each in moved)
        if kind not in kinds:
            kinds[kind] = solve(moved, time_limit_s=time_limit_s / 4, seed=seed, engine=engine)
        chosen.append(kinds[kind])
    outer = sorted(set(range(len(buffers))) - {index for members in inside for index in members})
    pseudo = [
        Buffer(f"pass {number}", start, end, plan.peak or 0)
        for number, ((start, end), plan) in enumerate(zip(passes, chosen, strict=True))
    ]
    left_s = max(1.0, begin + time_limit_s - time.monotonic())
    rest = [Buffer(f"buffer {index}", *_life(buffers[index])) for index in outer]
    model = solve([*pseudo, *rest], time_limit_s=left_s, seed=seed, engine=engine)
    for base, members, plan in zip(model.offsets, inside, chosen, strict=False):
        for index, offset in zip(members, plan.offsets, strict=True):
            offsets[index] = base + offset
    for index, offset in zip(outer, model.offsets[len(passes) :], strict=True):
        offsets[index] = offset
    peak = max((offset + each.size for offset, each in zip(offsets, buffers, strict=True)), default=0)
    if wrong := violations(buffers, offsets, peak=peak):
        raise RuntimeError(f"the planner made a plan that is wrong: {'; '.join(wrong)}")
    bound, first, last = max_live(buffers)
    whole = BufferPlan(
        offsets=tuple(offsets), peak=peak, lower_bound=bound,
        status=Status.OPTIMAL if peak == bound else Status.FEASIBLE,
        proof=f"max-live section [{first}, {last})", solver=f"two levels, {len(kinds)} kinds of passes",
        seconds=time.monotonic() - begin, notes=model.notes,
    )  # fmt: skip
    return Levels(whole, tuple(kinds.values()), model)


def _life(buffer: Buffer) -> tuple[int, int, int]:
    return buffer.lower, buffer.upper, buffer.size


def _members(buffers: Sequence[Buffer], passes: Sequence[Pass]) -> list[list[int]]:
    """Indices of the buffers that live inside each pass."""
    inside: list[list[int]] = [[] for _ in passes]
    order = sorted(range(len(buffers)), key=lambda index: (buffers[index].lower, index))
    number = 0
    for index in order:
        while number < len(passes) and passes[number][1] <= buffers[index].lower:
            number += 1
        if number == len(passes):
            break
        start, end = passes[number]
        if start <= buffers[index].lower and buffers[index].upper <= end:
            inside[number].append(index)
    return inside


def _check_passes(passes: Sequence[Pass]) -> None:
    problems = [
        Mistake(f"pass {number} takes no time", got=f"[{start}, {end})", allowed="start < end")
        for number, (start, end) in enumerate(passes)
        if start >= end
    ]
    problems += [
        Mistake(f"pass {number + 1} begins before pass {number} has ended", got=f"{later[0]} < {earlier[1]}")
        for number, (earlier, later) in enumerate(pairwise(passes))
        if later[0] < earlier[1]
    ]
    raise_if(problems)
