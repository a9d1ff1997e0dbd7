"""Crews: all ranks answer, failures reach the caller with their cause, and no process outlives its crew."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.crew import Crew, CrewError, crew

pytestmark = pytest.mark.ranks


class Worker:
    """Does what the tests ask for."""

    def __init__(self, rank: int, start: int) -> None:
        self.rank, self.value = rank, start

    def add(self, number: int) -> int:
        """Keeps state between orders."""
        self.value += number
        return self.value

    def summed(self) -> float:
        """All ranks are in one process group."""
        tensor = torch.tensor(float(self.rank))
        dist.all_reduce(tensor)
        return tensor.item()

    def fail(self, rank: int) -> int:
        """One rank raises."""
        if self.rank == rank:
            raise ValueError("this rank had enough")
        return os.getpid()

    def die(self, rank: int) -> None:
        """One rank says something and is gone."""
        if self.rank == rank:
            print("last words", flush=True)
            os._exit(7)

    def pid(self) -> int:
        """Of this rank."""
        return os.getpid()


def make(rank: int, world_size: int, start: int) -> Worker:
    """A worker for each rank."""
    return Worker(rank, start + world_size)


def refuse(rank: int, world_size: int) -> Worker:
    """No worker at all."""
    raise RuntimeError("nothing to work with")


def started(found: Crew) -> Crew:
    found.ready()
    return found


def test_every_rank_answers_in_its_place_and_keeps_its_state() -> None:
    with crew("adders", make, 10, world_size=2) as found:
        assert started(found).call("add", 1) == [13, 13]
        assert found.call("add", 1) == [14, 14]
        assert found.call("summed") == [1.0, 1.0]


def test_crews_do_not_meet_in_one_group() -> None:
    with crew("two", make, 0, world_size=2) as two, crew("three", make, 0, world_size=3) as three:
        assert started(three).call("summed") == [3.0] * 3
        assert started(two).call("summed") == [1.0] * 2


def test_a_rank_that_raises_is_named_with_its_traceback() -> None:
    with (
        crew("raisers", make, 0, world_size=2) as found,
        pytest.raises(CrewError, match=r"(?s)raisers: rank 1 .*this rank had enough"),
    ):
        started(found).call("fail", 1)


def test_a_rank_that_dies_is_named_with_its_last_output() -> None:
    with (
        crew("mortals", make, 0, world_size=2) as found,
        pytest.raises(CrewError, match=r"(?s)mortals: rank 0 died.*last words"),
    ):
        started(found).call("die", 0)


def test_a_worker_that_cannot_be_made_fails_when_the_crew_should_be_ready() -> None:
    with (
        crew("idlers", refuse, world_size=1) as found,
        pytest.raises(CrewError, match="nothing to work with"),
    ):
        found.ready()


def test_no_rank_outlives_its_crew_even_if_the_block_fails() -> None:
    pids: list[int] = []
    with pytest.raises(ZeroDivisionError), crew("mayflies", make, 0, world_size=2) as found:
        pids += started(found).call("pid")
        raise ZeroDivisionError
    assert len(set(pids)) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
