"""The helper that everybody's rank tests stand on: what reaches the test when ranks succeed, fail, die or hang."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from helpers.fake import fake_group
from helpers.leaks import processes
from helpers.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.ranks


def summed(rank: int, world_size: int, offset: int) -> tuple[float, torch.Tensor, np.ndarray]:
    values = torch.full((1000,), float(rank + offset))
    dist.all_reduce(values)
    return values[0].item(), torch.arange(3) * rank, np.full(2, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank_and_by_value(world_size: int) -> None:
    results = run_ranks(summed, world_size, 3)
    for rank, (total, tensor, array) in enumerate(results):
        assert total == sum(other + 3 for other in range(world_size))
        assert tensor.tolist() == [0, rank, 2 * rank]
        assert not tensor.is_shared()
        assert array.tolist() == [world_size, world_size]


def settings(rank: int, world_size: int) -> tuple[int, float, float, int]:
    return torch.get_num_threads(), torch.rand(()).item(), float(np.random.rand()), os.getpid()


def test_ranks_use_one_thread_the_same_seeds_and_processes_of_their_own() -> None:
    first, second = run_ranks(settings, 2)
    assert first[0] == second[0] == 1
    assert first[1:3] == second[1:3]
    assert len({first[3], second[3], os.getpid()}) == 3


def raises_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the cause is here")
    dist.barrier()


def test_the_first_failure_is_shown_with_its_traceback_and_the_others_in_one_line_each() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(raises_on_one, 3)
    assert caught.value.first == 1
    text = str(caught.value)
    assert text.startswith("rank 1 of 3 failed first:\nTraceback")
    assert "in raises_on_one" in text
    assert "ValueError: the cause is here" in text
    assert "  rank 0: " in text and "  rank 2: " in text


def dies(rank: int, world_size: int, how: str) -> None:
    if rank == 0 and how == "exit":
        os._exit(7)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@pytest.mark.parametrize(("how", "words"), [("exit", "exit code 7"), ("kill", "killed by SIGKILL")])
def test_a_rank_that_dies_without_a_word_is_named(how: str, words: str) -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(dies, 2, how)
    assert caught.value.first == 0
    assert words in caught.value.failures[0]


def hangs_on_one(rank: int, world_size: int) -> int:
    if rank == 1:
        threading.Event().wait()
    return os.getpid()


def test_a_rank_that_hangs_shows_where_it_stands_and_is_killed() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(hangs_on_one, 2, timeout_s=3.0)
    assert set(caught.value.failures) == {1}
    assert "in hangs_on_one" in caught.value.failures[1]
    assert "silent for 3 s" in str(caught.value)


def fails_while_the_other_hangs(rank: int, world_size: int) -> None:
    if rank == 0:
        threading.Event().wait()
    raise RuntimeError("broken")


def test_the_others_are_stopped_soon_after_the_first_failure() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        run_ranks(fails_while_the_other_hangs, 2, timeout_s=50.0)
    assert time.monotonic() - start < 25.0
    assert caught.value.first == 1
    assert "stopped" in caught.value.failures[0]


def tells_its_pid_and_hangs(rank: int, world_size: int, folder: str) -> None:
    Path(folder, f"{rank}.tmp").write_text(f"{os.getpid()} {os.getppid()}")  # the fork server's too
    Path(folder, f"{rank}.tmp").rename(Path(folder, f"{rank}.pid"))
    threading.Event().wait()


ORPHANS = """
import sys
from helpers import ranks
from infrastructure.test_ranks import tells_its_pid_and_hangs
if __name__ == "__main__":
    ranks.PRELOAD = ["torch"]  # is enough here
    ranks.run_ranks(tells_its_pid_and_hangs, 2, sys.argv[1])
"""


def within(condition: Callable[[], bool], *, timeout_s: float = 150.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.processes
def test_ranks_do_not_outlive_a_session_that_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with subprocess.Popen([sys.executable, "-c", ORPHANS, str(tmp_path)], env=environment) as session:
        files = [tmp_path / "0.pid", tmp_path / "1.pid"]
        told = within(lambda: all(file.exists() for file in files))
        session.kill()
    assert told
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    assert within(lambda: not any(pid in processes() for pid in pids))


def unpicklable(rank: int, world_size: int) -> object:
    return lambda: rank


def test_a_result_that_cannot_be_copied_is_a_failure_and_not_a_hang() -> None:
    with pytest.raises(RankFailure, match="pickle"):
        run_ranks(unpicklable, 1)


def test_a_fake_group_carries_a_mesh_of_a_thousand_ranks_and_leaves_nothing() -> None:
    with fake_group(1024, rank=129):
        mesh = init_device_mesh("cpu", (8, 16, 8), mesh_dim_names=("pp", "dp", "tp"))
        assert tuple(mesh.get_coordinate() or ()) == (1, 0, 1)
        assert mesh["tp"].size() == 8
    assert not dist.is_initialized()
