"""Which global rank runs where: in order of nodes, or as a ParallelPlan places them."""

from collections.abc import Sequence
from itertools import accumulate

from distrain.core.errors import Problem, raise_if

Placement = tuple[tuple[int, ...], ...]


def in_order(nprocs: Sequence[int]) -> Placement:
    """Node k gets the ``nprocs[k]`` ranks that follow those of the nodes before it."""
    ends = list(accumulate(nprocs))
    return tuple(tuple(range(end - n, end)) for end, n in zip(ends, nprocs, strict=True))


def read_plan(path: str, *, nprocs: Sequence[int]) -> Placement:
    """The placement of the plan at ``path`` over nodes of ``nprocs`` ranks.

    Raises ConfigError if the plan cannot be read, is for another number of ranks, or does not place each rank once.
    """
    from distrain.planners.parallelism import ParallelPlan

    plan = ParallelPlan.load(path)
    raise_if(placement_problems(plan.placement, world_size=plan.world_size, nprocs=nprocs))
    return tuple(tuple(ranks) for ranks in plan.placement) or in_order(nprocs)


def placement_problems(
    placement: Sequence[Sequence[int]], *, world_size: int, nprocs: Sequence[int]
) -> list[Problem]:
    """Everything that keeps ``placement`` (ranks by node; empty: in order) from fitting nodes of ``nprocs`` ranks."""
    problems = []
    num_ranks = sum(nprocs)
    if world_size != num_ranks:
        problems.append(
            Problem(
                "the plan is for another number of ranks",
                got=f"world_size = {world_size}, but {len(nprocs)} nodes give {num_ranks}",
                hint="plan for this many ranks, or change --nnodes and --nproc-per-node",
            )
        )
    if not placement:
        return problems
    if len(placement) != len(nprocs):
        problems.append(
            Problem(
                "the plan places ranks on another number of nodes",
                got=f"{len(placement)}",
                allowed=f"{len(nprocs)}",
            )
        )
    for node, (ranks, nproc) in enumerate(zip(placement, nprocs, strict=False)):
        if len(ranks) != nproc:
            problems.append(
                Problem(
                    f"the plan gives node {node} too many or too few ranks",
                    got=f"{len(ranks)}",
                    allowed=f"{nproc}",
                )
            )
    placed = [rank for ranks in placement for rank in ranks]
    twice = sorted({rank for rank in placed if placed.count(rank) > 1})
    missing = sorted(set(range(num_ranks)) - set(placed))
    unknown = sorted(set(placed) - set(range(num_ranks)))
    for ranks, error in (
        (twice, "more than once"),
        (missing, "nowhere"),
        (unknown, "though they do not exist"),
    ):
        if ranks:
            problems.append(
                Problem(
                    f"the plan places ranks {error}", got=", ".join(map(str, ranks)), allowed="each rank once"
                )
            )
    return problems
