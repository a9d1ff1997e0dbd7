"""Ranks that enter a collective late, not at all, with other sizes or out of order: what the others get from it."""

import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distrain.core.failpoints import FAILPOINTS, hit
from distrain.core.protocols import CollectiveCall
from distrain.faults.inject import FaultPlan, Injector, arm, read_truth
from helpers.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.ranks


@contextmanager
def armed(rank: int, variables: dict[str, str]) -> Iterator[None]:
    """This rank, with its part of the plan."""
    with arm(environ={**variables, "RANK": str(rank)}):
        yield
    assert FAILPOINTS.names() == []


def run(plan: FaultPlan, folder: Path, body: Callable[..., Any], *, world_size: int = 2) -> list[Any]:
    with Injector(plan, folder / "truth") as injector:
        return run_ranks(body, world_size, injector.variables)


# -- what passes the seam --------------------------------------------------------------------------------------


def seen_by_every_way(rank: int, world_size: int) -> dict[str, list[str]]:
    from distrain.faults.inject.engines.intercept import Issue, intercept

    calls: list[CollectiveCall] = []

    def around(call: CollectiveCall, arguments: Any, issue: Issue) -> Any:
        calls.append(call)
        return issue(*arguments)

    found = {}
    with ExitStack() as stack:
        intercept(around, stack)
        for name, way in WAYS.items():
            way(rank)
            dist.barrier()
            found[name] = sorted({call.name for call in calls[:-1]})
            calls.clear()
    dist.all_reduce(torch.ones(1))
    assert not calls  # nothing is left in between
    return found


def _functional(rank: int) -> None:
    import torch.distributed._functional_collectives as functional

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        world = dist.group.WORLD
        assert world is not None
        total = functional.all_reduce(torch.ones(4), "sum", world)
        assert functional.all_gather_tensor(total, 0, world).sum() == 16


def _ddp(rank: int) -> None:
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(2, 4)).sum().backward()


def _fsdp2(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(4, 4)
    fully_shard(model)
    model(torch.ones(2, 4)).sum().backward()


def _pairs(rank: int) -> None:
    one, other = torch.ones(4), torch.empty(4)
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, one, 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]
    )
    for work in works:
        work.wait()


def _dtensor(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)], src_data_rank=None).redistribute(
        mesh, [Replicate()]
    )


WAYS: dict[str, Callable[[int], object]] = {
    "all_reduce": lambda rank: dist.all_reduce(torch.ones(4)),
    "all_gather": lambda rank: dist.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4)),
    "barrier": lambda rank: dist.barrier(),
    "broadcast": lambda rank: dist.broadcast(torch.ones(4), 0),
    "all_to_all": lambda rank: dist.all_to_all_single(torch.empty(4), torch.ones(4)),
    "functional": _functional,
    "dtensor": _dtensor,
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "pairs": _pairs,
}


def test_every_way_of_communicating_passes_the_seam() -> None:
    first, second = run_ranks(seen_by_every_way, 2)
    assert first == second
    for name in ("all_reduce", "all_gather", "barrier", "broadcast", "all_to_all"):
        assert first[name] == [name]
    assert first["functional"] == ["all_gather", "all_reduce"]
    assert "all_gather" in first["dtensor"]
    assert "all_reduce" in first["ddp"]
    assert first["fsdp2"] == ["all_gather", "reduce_scatter"]
    assert first["pairs"] == ["recv", "send"]


# -- faults ----------------------------------------------------------------------------------------------------


def sums(rank: int, world_size: int, variables: dict[str, str]) -> list[float]:
    """Five sums, of which each takes as long as the last rank to enter."""
    took = []
    with armed(rank, variables):
        for _ in range(5):
            start = time.monotonic()
            total = torch.full((4,), float(rank + 1))
            dist.all_reduce(total)
            assert total.tolist() == [3.0] * 4
            took.append(time.monotonic() - start)
    return took


def test_a_late_rank_keeps_the_other_waiting_in_that_collective(tmp_path: Path) -> None:
    plan = FaultPlan().inject("comm.delay", ranks=[1], delay_s=0.5).at(op=3)
    waited, _ = run(plan, tmp_path, sums)
    assert waited[2] >= 0.45
    assert waited.index(max(waited)) == 2
    (record,) = read_truth(tmp_path / "truth")
    assert (record.victim, record.detail["collective"], record.detail["sequence"]) == (1, "all_reduce", 2)


def in_steps(rank: int, world_size: int, variables: dict[str, str]) -> list[int]:
    """In which steps, and in which of a step's collectives, the other one was waited for."""
    late = []
    with armed(rank, variables):
        for step in range(1, 5):
            hit("train.step", step=step)
            for number, collective in enumerate((WAYS["barrier"], WAYS["all_reduce"])):
                start = time.monotonic()
                collective(rank)
                if time.monotonic() - start > 0.25:
                    late.append(10 * step + number)
    return late


def test_a_collective_is_chosen_by_its_name_and_step_and_number(tmp_path: Path) -> None:
    plan = (
        FaultPlan()
        .inject("comm.delay", ranks=[1], delay_s=0.4, collective="all_reduce")
        .at(step=2)
        .inject("comm.delay", ranks=[1], delay_s=0.4, collective="all_reduce")
        .at(step=4, op=1)
    )
    late, _ = run(plan, tmp_path, in_steps)
    assert late == [21, 41]


def one_less(rank: int, world_size: int, variables: dict[str, str]) -> list[list[float]]:
    """Rank 1 makes one call more, since its first one is not to happen."""
    found = []
    with armed(rank, variables):
        for _ in range(1 + rank):
            total = torch.full((2,), float(rank + 1))
            dist.all_reduce(total)
            found.append(total.tolist())
    return found


def test_a_rank_that_skips_goes_on_and_meets_the_others_one_too_early(tmp_path: Path) -> None:
    plan = FaultPlan().inject("comm.skip", ranks=[1]).at(op=1)
    waited, skipped = run(plan, tmp_path, one_less)
    assert waited == [[3.0, 3.0]]
    assert skipped == [[2.0, 2.0], [3.0, 3.0]]


def unequal(rank: int, world_size: int, variables: dict[str, str]) -> str:
    with armed(rank, variables):
        try:
            total = torch.full((8,), float(rank + 1))
            dist.all_reduce(total)
        except RuntimeError as error:
            return str(error)
    return str(total.tolist())


def test_a_mismatch_breaks_the_collective_for_everybody(tmp_path: Path) -> None:
    plan = FaultPlan().inject("comm.mismatch", ranks=[1]).at(op=1)
    try:
        outcomes = run(plan, tmp_path, unequal)
    except RankFailure as failure:
        outcomes = list(failure.failures.values())
    assert str([3.0] * 8) not in outcomes
    assert [record.kind for record in read_truth(tmp_path / "truth")] == ["comm.mismatch"]


def two_at_once(rank: int, world_size: int, variables: dict[str, str]) -> list[list[float]]:
    one, other = torch.full((2,), 1.0 + rank), torch.full((2,), 10.0 + rank)
    with armed(rank, variables):
        for work in (dist.all_reduce(one, async_op=True), dist.all_reduce(other, async_op=True)):
            assert work is not None
            work.wait()
        third = torch.ones(2)
        dist.all_reduce(third)
    return [one.tolist(), other.tolist(), third.tolist()]


def test_collectives_out_of_order_add_up_what_does_not_belong_together(tmp_path: Path) -> None:
    plan = FaultPlan().inject("comm.reorder", ranks=[1], hold_s=30.0)
    mine, its = run(plan, tmp_path, two_at_once)
    assert mine == [[12.0] * 2, [12.0] * 2, [2.0] * 2]
    assert its == [[12.0] * 2, [12.0] * 2, [2.0] * 2]
    (record,) = read_truth(tmp_path / "truth")
    assert record.detail["sequences"] == [1, 0]


def one_at_a_time(rank: int, world_size: int, variables: dict[str, str]) -> list[float]:
    with armed(rank, variables):
        total = torch.full((2,), 1.0 + rank)
        work = dist.all_reduce(total, async_op=True)
        assert work is not None
        work.wait()
    return total.tolist()


def test_what_nobody_overtakes_comes_in_order_and_counts_as_no_fault(tmp_path: Path) -> None:
    plan = FaultPlan().inject("comm.reorder", ranks=[1], hold_s=0.2)
    assert run(plan, tmp_path, one_at_a_time) == [[3.0] * 2] * 2
    assert read_truth(tmp_path / "truth") == []


# -- other faults, inside a collective -------------------------------------------------------------------------


def fails_inside(rank: int, world_size: int, variables: dict[str, str]) -> list[float]:
    totals = []
    with armed(rank, variables):
        for step in range(1, 4):
            hit("train.step", step=step)
            total = torch.full((1,), float(rank + 1))
            try:
                dist.all_reduce(total)
                totals.append(total.item())
            except RuntimeError as error:
                totals.append(-1.0 if "inside" in str(error) else -2.0)
            if step == 2:
                dist.barrier()  # a rank that leaves at once may take along what it has not sent yet
                return totals
    return totals


def test_a_fault_inside_a_collective_comes_when_the_rank_has_entered_it(tmp_path: Path) -> None:
    """The other rank gets its sum of that step: the failing one had given its part."""
    plan = FaultPlan().inject("proc.exception", ranks=[1], where="in_collective", message="inside").at(step=2)
    assert run(plan, tmp_path, fails_inside) == [[3.0, 3.0], [3.0, -1.0]]


def dies_inside(rank: int, world_size: int, variables: dict[str, str]) -> Tensor:
    with armed(rank, variables):
        while True:
            dist.all_reduce(torch.ones(1))


def test_a_rank_is_killed_inside_its_third_collective(tmp_path: Path) -> None:
    plan = FaultPlan().inject("proc.sigkill", ranks=[1], where="in_collective").at(op=3)
    with pytest.raises(RankFailure) as caught:
        run(plan, tmp_path, dies_inside)
    assert caught.value.first == 1 and "SIGKILL" in caught.value.failures[1]
    (record,) = read_truth(tmp_path / "truth")
    assert record.pid != os.getpid()


def issued_faster_than_they_end(rank: int, world_size: int) -> int:
    from distrain.faults.inject.engines.intercept import watch_collectives

    with ExitStack() as stack:
        watch_collectives(stack)
        for number in range(3000):
            # Once it has ended, nobody but the thread that carried it out holds what is sent, and the next begins.
            dist.all_gather([torch.zeros(1) for _ in range(world_size)], torch.ones(1) * number)
        return number


def test_the_seam_never_waits_for_a_thread_that_waits_for_it() -> None:
    assert run_ranks(issued_faster_than_they_end, 2) == [2999, 2999]


def kept_alive(rank: int, world_size: int) -> list[str]:
    """Devices on which the seam holds what a collective was given; there need not be a GPU."""
    from distrain.faults.inject.engines.intercept import watch_collectives

    class Kernel:
        def call_boxed(self, *arguments: Any) -> None:
            pass

    class Library:
        def __init__(self, *words: str) -> None:
            pass

        def impl(self, operator: str, ours: Callable[..., Any], key: str, **flags: bool) -> None:
            seams[operator, key] = ours

        def _destroy(self) -> None:
            pass

    seams: dict[tuple[str, str], Callable[..., Any]] = {}
    world = dist.group.WORLD
    assert world is not None
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.library, "get_kernel", lambda *words: Kernel())
        patch.setattr(torch.library, "Library", Library)
        watch_collectives(stack)
        given = {}
        for key in ("CPU", "CUDA"):
            tensor = torch.ones(1)
            given[key] = weakref.ref(tensor)
            seams["allreduce_", key](None, [tensor], world.boxed())
            del tensor
        return [key for key, tensor in given.items() if tensor() is not None]


def test_the_memory_of_a_gpu_is_not_held_by_the_seam() -> None:
    assert run_ranks(kept_alive, 1) == [["CPU"]]


def threads_that_stay(rank: int, world_size: int) -> set[str]:
    """Those of a group that is no more."""
    from distrain.faults.inject.engines.intercept import watch_collectives

    with ExitStack() as stack:
        watch_collectives(stack)
        before = set(os.listdir("/proc/self/task"))
        group = dist.new_group([0, 1])
        for _ in range(4):
            dist.all_reduce(torch.ones(1), group=group)
        during = set(os.listdir("/proc/self/task"))
        assert during > before  # those of gloo are among them
        dist.destroy_process_group(group)
        del group
        deadline = time.monotonic() + 30
        # One that was joined may still be listed, until the kernel has taken it out.
        while (
            left := set(os.listdir("/proc/self/task")) & (during - before)
        ) and time.monotonic() < deadline:
            time.sleep(0.001)
        return left


def test_a_group_that_is_destroyed_is_gone_with_its_threads_though_faults_watch_it() -> None:
    """One that still runs when the interpreter ends would take the whole process along."""
    assert run_ranks(threads_that_stay, 2) == [set(), set()]
