"""Which global rank runs where: in order of nodes, or as a ParallelPlan places them."""

from collections.abc import Sequence
from itertools import accumulate

from distrain.core.errors import Problem, raise_if
from distrain.planners.parallel_plan import ParallelPlan

Placement = tuple[tuple[int, ...], ...]


def in_order(nprocs: Sequence[int]) -> Placement:
    """Node k gets the ``nprocs[k]`` ranks that follow those of the nodes before it."""
    ends = list(accumulate(nprocs))
    return tuple(tuple(range(end - n, end)) for end, n in zip(ends, nprocs, strict=True))


def read_plan(path: str, *, nprocs: Sequence[int]) -> Placement:
    """The placement of the plan at ``path`` over nodes of ``nprocs`` ranks.

    Raises ConfigError if the plan cannot be read or used, or is for other nodes than these.
    """
    plan = ParallelPlan.load(path)
    raise_if(_misfits(plan, nprocs))
    return plan.placement or in_order(nprocs)


def _misfits(plan: ParallelPlan, nprocs: Sequence[int]) -> list[Problem]:
    """What keeps ``plan``, sound in itself, from fitting nodes of ``nprocs`` ranks."""
    problems = []
    if plan.world_size != sum(nprocs):
        hint = "plan anew, or change --nnodes and --nproc-per-node"
        got = f"the plan: {plan.world_size}, the launch: {sum(nprocs)}"
        problems.append(Problem("the plan is for another number of ranks", got=got, hint=hint))
    if not plan.placement:
        return problems
    if len(plan.placement) != len(nprocs):
        got = f"the plan: {len(plan.placement)}, the launch: {len(nprocs)}"
        problems.append(Problem("the plan is for another number of nodes", got=got))
    for node, (ranks, nproc) in enumerate(zip(plan.placement, nprocs, strict=False)):
        if len(ranks) != nproc:
            got = f"the plan: {len(ranks)}, the launch: {nproc}"
            problems.append(Problem(f"the plan is for another number of ranks on node {node}", got=got))
    return problems
