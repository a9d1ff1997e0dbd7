"""Process groups that only their members make."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from distrain.core.vocabulary import Degrees
from distrain.parallel import init
from helpers.ranks import run_ranks


def _sum(group: dist.ProcessGroup) -> float:
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=group)
    return total.item()


def _after_different_histories(rank: int, world_size: int) -> list[float]:
    groups = init(Degrees(dp=world_size), device="cpu").groups
    sums = []
    for ranks in ((0, 1), (0, 2), (1, 2), (0, 3), (0, 1, 2, 3)):
        if rank in ranks:
            sums.append(_sum(groups.of(ranks)))
    return sums


@pytest.mark.ranks
def test_ranks_that_are_in_different_numbers_of_groups_find_each_other() -> None:
    assert run_ranks(_after_different_histories, 4) == [[1, 2, 3, 6], [1, 3, 6], [2, 3, 6], [3, 6]]


def _dropped_and_made_again(rank: int, world_size: int) -> list[float]:
    groups = init(Degrees(dp=world_size), device="cpu").groups.apart("test")
    before = len(dist.distributed_c10d._world.pg_map)
    sums = []
    for _ in range(3):
        sums.append(_sum(groups.of((0, 1))))
        assert groups.of((0, 1)) is groups.of((0, 1))
        assert len(dist.distributed_c10d._world.pg_map) == before + 1
        groups.drop((0, 1))
        assert len(dist.distributed_c10d._world.pg_map) == before
    return sums


def _apart_twice(rank: int, world_size: int) -> list[float]:
    groups = init(Degrees(dp=world_size), device="cpu").groups
    return [_sum(groups.apart("test").of((0, 1))) for _ in range(2)]


@pytest.mark.ranks
def test_two_registries_of_one_purpose_have_groups_of_their_own() -> None:
    assert run_ranks(_apart_twice, 2) == [[1, 1], [1, 1]]


@pytest.mark.ranks
def test_a_group_can_be_given_up_and_made_again() -> None:
    assert run_ranks(_dropped_and_made_again, 2) == [[1, 1, 1]] * 2


def _in_two_lives(rank: int, world_size: int) -> list[float]:
    """Two loops in one process, each with an ``init`` of its own, and a rank that has been in other groups."""
    sums = []
    for _ in range(2):
        groups = init(Degrees(dp=world_size), device="cpu").groups
        if rank < 2:
            sums.append(_sum(groups.of((0, 1))))
        sums.append(_sum(groups.apart("test").of((0, 1, 2))))
    return sums


@pytest.mark.ranks
def test_a_process_that_joins_twice_has_groups_of_their_own() -> None:
    assert run_ranks(_in_two_lives, 3) == [[1, 3, 1, 3]] * 2 + [[3, 3]]


def _nobody_comes(rank: int, world_size: int) -> list[str]:
    """What a rank is told in each of its groups while the others stay away."""
    parallel = init(Degrees(dp=2, dp_shard=2, tp=2), device="cpu", timeout=timedelta(milliseconds=300))
    said = []
    for name in ("dp", "dp_shard", "tp", "model") if rank == 0 else ():
        with pytest.raises(RuntimeError) as caught:
            _sum(parallel.groups.axis(name))
        said.append(str(caught.value))
    store = dist.distributed_c10d._get_default_store()
    store.set("seen", "") if rank == 0 else store.wait(["seen"])
    return said


@pytest.mark.ranks
def test_no_axis_waits_longer_than_it_was_told() -> None:
    said = run_ranks(_nobody_comes, 4)[0]
    assert len(said) == 4
    assert all("300ms" in text for text in said), said
