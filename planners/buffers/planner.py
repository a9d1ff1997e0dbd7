"""Addresses for buffers, and a proof of how good they are: each means in its turn, the cheap ones first.

1. Bounds. Below the max-live bound nothing fits: a capacity below it is answered at once.
2. Parts that are apart in time are planned apart; a part that fits under the bound of another needs no more thought.
3. Heuristics (``greedy.py``). A peak at the bound is optimal, and most training traces end here.
4. The complete search (``skyline.py``) at the capacity, or at the bound. If that is proven impossible, the bound rises;
   if time runs out, peaks in between are tried.
5. The program (``milp.py``): a proof for small parts, neighbourhoods of the best plan for larger ones.

Whatever was found is checked by ``validate.py`` before it leaves.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from . import milp
from .bounds import Sections, components, max_live, sections
from .engine import Engine
from .engine import engine as fastest
from .greedy import Packing, portfolio, squeak
from .problem import Buffer, check
from .result import BufferPlan, Status
from .validate import violations

_SEARCHED = 2_000_000
"""cells of a part that the search may look at: beyond, one descent would take longer than anybody waits"""

_MOST_PAIRS = 700
"""of a part whose peak the program is asked to prove; more are hopeless"""

_MOST_BUFFERS = 600
"""of a part that becomes a program at all"""

_NEIGHBOURHOODS, _NEIGHBOURS = 100, 14
"""how many are tried, and how many buffers each frees"""


def solve(
    buffers: Sequence[Buffer],
    *,
    capacity: int | None = None,
    time_limit_s: float = 60.0,
    seed: int = 0,
    engine: Engine | None = None,
) -> BufferPlan:
    """Plan ``buffers`` under ``capacity``, or with the lowest peak if there is none.

    With a capacity the first plan that fits is the answer. ``engine`` is the native one if it was built before.
    ConfigError lists what is wrong with the buffers.
    """
    check(buffers)
    begin = time.monotonic()
    chosen = engine or fastest()
    notes = (f"no native search: {chosen.lacking}",) if chosen.lacking else ()
    alive = [index for index, buffer in enumerate(buffers) if buffer.size]
    bound, start, end = max_live([buffers[index] for index in alive])
    proof = f"max-live section [{start}, {end})"
    if capacity is not None and capacity < bound:
        return BufferPlan(
            offsets=(), peak=None, lower_bound=bound, status=Status.INFEASIBLE,
            proof=f"{proof} holds {bound}", solver="bounds", seconds=time.monotonic() - begin, notes=notes,
        )  # fmt: skip
    cut = sections([buffers[index] for index in alive])
    best = _solve_parts(_Task(cut, chosen, capacity, seed, begin + time_limit_s), bound, proof)
    seconds = time.monotonic() - begin
    if best.packing is None:
        status = Status.INFEASIBLE if capacity is not None and best.bound > capacity else Status.UNDECIDED
        return BufferPlan(
            offsets=(), peak=None, lower_bound=best.bound, status=status, proof=best.proof, solver=best.solver,
            seconds=seconds, notes=notes,
        )  # fmt: skip
    offsets = np.zeros(len(buffers), np.int64)
    offsets[alive] = best.packing.offsets
    status = Status.OPTIMAL if best.packing.peak == best.bound else Status.FEASIBLE
    plan = BufferPlan(
        offsets=tuple(offsets.tolist()), peak=best.packing.peak, lower_bound=best.bound, status=status,
        proof=best.proof, solver=best.solver, seconds=seconds, notes=notes,
    )  # fmt: skip
    if wrong := violations(buffers, plan.offsets, peak=best.packing.peak, capacity=capacity):
        raise RuntimeError(f"the planner made a plan that is wrong: {'; '.join(wrong)}")
    return plan


@dataclass(frozen=True, slots=True)
class _Task:
    """A problem, or a part of one."""

    cut: Sections
    engine: Engine
    capacity: int | None
    seed: int
    deadline: float

    @property
    def left_s(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


@dataclass(frozen=True, slots=True)
class _Best:
    """The best plan so far (none if it must fit under a capacity and does not), and what is proven."""

    packing: Packing | None
    bound: int
    proof: str
    solver: str


def _solve_parts(task: _Task, bound: int, proof: str) -> _Best:
    """Plan what is apart in time apart. A part may be as high as the highest bound among them."""
    parts = [(indices, _part(task.cut, indices)) for indices in components(task.cut)]
    offsets, peak, solvers = np.zeros(len(task.cut.size), np.int64), 0, ["bounds"]
    parts.sort(key=lambda part: -part[1].max_live)
    for indices, cut in parts:
        target = bound if task.capacity is None else task.capacity
        best = _solve_part(replace(task, cut=cut), target, proof)
        if best.bound > bound:
            bound, proof = best.bound, best.proof
        if best.packing is None:
            return _Best(None, bound, best.proof, best.solver)
        offsets[indices] = best.packing.offsets
        if best.packing.peak > peak:
            peak, solvers = best.packing.peak, [best.solver]
            if best.packing.peak > bound:
                proof = best.proof
    packing = Packing(peak, offsets, np.arange(len(offsets), dtype=np.int32), solvers[0])
    return _Best(packing, bound, proof, solvers[0])


def _part(cut: Sections, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Sections:
    lower, upper, size = cut.lower[indices], cut.upper[indices], cut.size[indices]
    begin, end = int(lower.min()), int(upper.max())
    return Sections(end - begin, lower - begin, upper - begin, size, cut.load[begin:end])


def _solve_part(task: _Task, target: int, proof: str) -> _Best:
    """Down to ``target`` if that can be reached: the capacity, or the bound, whose ``proof`` is known."""
    quick_until = time.monotonic() + task.left_s / 4
    packing = portfolio(task.cut, task.engine, target=target, deadline=quick_until)
    solver = f"greedy ({packing.name})"
    if packing.peak > target and (task.capacity is None or task.cut.num_cells > _SEARCHED):
        rounds = 1000 if task.cut.num_cells > _SEARCHED else 50
        better = squeak(
            task.cut, packing, task.engine, target=target, seed=task.seed, deadline=quick_until, rounds=rounds
        )
        if better.peak < packing.peak:
            packing, solver = better, f"greedy ({better.name})"
    if packing.peak <= target:
        return _Best(packing, max(task.cut.max_live, target if task.capacity is None else 0), proof, solver)
    if task.capacity is not None:
        return _decided(task)
    best = _searched(task, _Best(packing, target, proof, solver))
    return _programmed(task, best)


def _decided(task: _Task) -> _Best:
    """Does it fit under the capacity?"""
    assert task.capacity is not None
    name, bound = task.engine.name, task.cut.max_live
    if task.cut.num_cells > _SEARCHED:
        return _Best(None, bound, "too large for the complete search", "greedy")
    found = task.engine.fit(task.cut, capacity=task.capacity, seed=task.seed, max_seconds=task.left_s)
    tried = f"{found.num_nodes} nodes, {found.num_restarts} restarts"
    if found.fits is None:
        return _Best(None, bound, f"time limit after {tried}", name)
    if not found.fits:
        above = (task.capacity // task.cut.step + 1) * task.cut.step
        return _Best(None, above, f"exhausted: nothing fits under {task.capacity} ({tried})", name)
    return _Best(_packing(task.cut, found.offsets, name), bound, "fits under the capacity", name)


def _searched(task: _Task, best: _Best) -> _Best:
    """Close in on the lowest peak: at the bound first, then between what is proven, or was tried, and the best plan."""
    assert best.packing is not None
    step = task.cut.step
    if task.cut.num_cells > _SEARCHED:
        return best
    tried = best.bound - step  # the highest peak at which the search has given up, or was proven to fail
    aim = -(-best.bound // step) * step
    while best.packing.peak > max(best.bound, tried + step) and task.left_s > 0.05:
        found = task.engine.fit(task.cut, capacity=aim, seed=task.seed, max_seconds=task.left_s / 3)
        if found.fits:
            packing = _packing(task.cut, found.offsets, task.engine.name)
            best = replace(best, packing=packing, solver=task.engine.name)
        else:
            tried = aim
            if found.fits is False:
                proof = f"exhausted: nothing fits under {aim} ({found.num_nodes} nodes)"
                best = replace(best, bound=aim + step, proof=proof)
        assert best.packing is not None
        aim = tried + max(1, (best.packing.peak - tried) // (2 * step)) * step
    return best


def _programmed(task: _Task, best: _Best) -> _Best:
    """Ask the MIP: for the proof if the part is small, otherwise for a better plan in its neighbourhoods."""
    if best.packing is None or len(task.cut.size) > _MOST_BUFFERS:
        return best
    small = len(milp.pairs(task.cut)) <= _MOST_PAIRS
    random = np.random.default_rng(task.seed)
    for _ in range(1 if small else _NEIGHBOURHOODS):
        packing = best.packing
        if packing is None or packing.peak <= best.bound or task.left_s < 1:
            break
        found = milp.minimise(
            task.cut, upper_bound=packing.peak, lower_bound=best.bound, start=packing.offsets.tolist(),
            time_limit_s=task.left_s if small else min(5.0, task.left_s),
            free=None if small else _neighbourhood(task.cut, packing, random),
        )  # fmt: skip
        if found.lower_bound > best.bound:
            best = replace(best, bound=found.lower_bound, proof="the bound of the MIP")
        if found.peak is not None and found.peak < packing.peak:
            best = replace(best, packing=_packing(task.cut, found.offsets, "MIP"), solver="MIP")
    return best


def _neighbourhood(cut: Sections, packing: Packing, random: np.random.Generator) -> frozenset[int]:
    """A buffer that reaches the peak, and some of those that live with it."""
    tops = packing.offsets + cut.size
    highest = int(random.choice(np.flatnonzero(tops == tops.max())))
    near = np.flatnonzero((cut.lower < cut.upper[highest]) & (cut.upper > cut.lower[highest]))
    chosen = random.choice(near, min(len(near), _NEIGHBOURS), replace=False)
    return frozenset((highest, *chosen.tolist()))


def _packing(cut: Sections, offsets: Sequence[int], name: str) -> Packing:
    array = np.array(offsets, np.int64)
    order = np.argsort(array, kind="stable").astype(np.int32)
    return Packing(int((array + cut.size).max(initial=0)), array, order, name)
