"""What an allocation plan is, and how one is made from what a step was seen to ask for.

A step is a sequence of requests, each known by phase, position within the phase, and size. What is born and freed
within the step gets an offset in the arena by ``distrain.planners.buffers``. Gradients that live until the next
step's ``zero_grad`` cross the border of steps, which shows if two steps or more were recorded::

    step 1                        step 2
    |   g ========================|====        |      one address can serve every step's g: planned, for the whole step
    |                  m =========|============|      still alive when step 2 asks for its own m: not planned

What is not planned is expected and served by the allocator beneath; so is what was never freed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distrain.core.errors import Problem, raise_if
from distrain.planners.buffers import Buffer, BufferPlan, solve
from distrain.planners.buffers.problem import aligned

MOST_PHASES = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a step: ``size`` bytes, from the event ``born`` to just before ``died`` (None: never)."""

    phase: int
    size: int
    born: int
    died: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the plan puts a request; an ``offset`` of None leaves it to the allocator beneath."""

    phase: int
    size: int
    offset: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationPlan:
    """Places in the order of the requests, each phase on its own."""

    places: tuple[Place, ...]
    arena_bytes: int
    """the plan's peak: all that the planned requests ever need"""
    lower_bound_bytes: int
    """no plan needs less"""
    min_bytes: int
    """smaller requests are no part of the plan"""
    alignment: int

    def __post_init__(self) -> None:
        raise_if(list(self._mistakes()))

    def _mistakes(self) -> Sequence[Problem]:
        found = []
        if self.min_bytes < 1 or self.alignment < 1 or self.arena_bytes < 0:
            found.append(
                Problem(
                    "an allocation plan has an impossible measure",
                    got=f"min_bytes {self.min_bytes}, alignment {self.alignment}, arena_bytes {self.arena_bytes}",
                )
            )
        for index, place in enumerate(self.places):
            where = f"request {index} of an allocation plan"
            if not 0 <= place.phase < MOST_PHASES:
                found.append(Problem(f"{where} has no possible phase", allowed=f"0 to {MOST_PHASES - 1}"))
            if place.size < max(self.min_bytes, 1):
                found.append(Problem(f"{where} is too small for the plan", got=str(place.size)))
            if place.offset is not None and not 0 <= place.offset <= self.arena_bytes - place.size:
                found.append(Problem(f"{where} leaves the arena", got=f"offset {place.offset}"))
            if place.offset is not None and place.offset % max(self.alignment, 1):
                found.append(Problem(f"{where} is not aligned", got=f"offset {place.offset}"))
        return found


def buffers_of(requests: Sequence[Request]) -> tuple[Buffer, ...]:
    """The requests of one step as buffers, in order; those that never die live to its end."""
    end = max((max(each.born, each.died or 0) for each in requests), default=0) + 1
    return tuple(
        Buffer(str(index), each.born, end if each.died is None else each.died, each.size)
        for index, each in enumerate(requests)
    )


def plan_requests(
    requests: Sequence[Request], *, min_bytes: int = 1, alignment: int, time_limit_s: float = 10.0
) -> AllocationPlan:
    """The plan with the lowest peak that can be found in the time given; what never dies is not planned."""
    chosen = [index for index, each in enumerate(requests) if each.died is not None]
    solved: BufferPlan = solve(
        aligned(buffers_of([requests[index] for index in chosen]), alignment=alignment),
        time_limit_s=time_limit_s,
    )
    if solved.peak is None:  # without a capacity there always is a plan
        raise RuntimeError(f"the buffer planner found no plan: {solved.proof}")
    offsets = dict(zip(chosen, solved.offsets, strict=True))
    return AllocationPlan(
        places=tuple(
            Place(phase=each.phase, size=each.size, offset=offsets.get(index))
            for index, each in enumerate(requests)
        ),
        arena_bytes=solved.peak,
        lower_bound_bytes=solved.lower_bound,
        min_bytes=min_bytes,
        alignment=alignment,
    )


def one_step(steps: Sequence[Sequence[Request]]) -> tuple[Request, ...]:
    """The step to plan of those recorded: the last whose blocks are seen in the step after, or else the only one.

    Blocks that cross into the next step live for the whole of this one if one address can serve them, and never die
    otherwise.
    """
    if not steps:
        return ()
    step = steps[max(0, len(steps) - 2)]
    following = steps[-1] if len(steps) > 1 else ()
    if not step or not following:
        return tuple(step)
    begin, end = step[0].born, following[0].born
    rebirths = dict(zip(_names(following), following, strict=True))
    chosen = []
    for name, each in zip(_names(step), step, strict=True):
        if each.died is None or each.died < end:
            chosen.append(each)
            continue
        again = rebirths.get(name)
        is_free_in_time = again is not None and again.size == each.size and each.died < again.born
        chosen.append(replace(each, born=begin, died=end) if is_free_in_time else replace(each, died=None))
    return tuple(chosen)


def _names(step: Sequence[Request]) -> list[tuple[int, int]]:
    """Phase and ordinal of each request."""
    seen: dict[int, int] = {}
    names = []
    for each in step:
        names.append((each.phase, seen.setdefault(each.phase, 0)))
        seen[each.phase] += 1
    return names
