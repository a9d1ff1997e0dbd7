"""torch under the launcher: the environment is torchrun's, collectives work, a dead rank hangs nobody."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from distrain.launch.environ import HEAP

pytestmark = [pytest.mark.processes, pytest.mark.slow]
Launch = Callable[..., Any]
Script = Callable[[str], str]
AllGone = Callable[[list[int]], None]

SHOW = "import json; print(json.dumps([rank, sys.argv[1:], dict(os.environ)]))"
OURS = {"DISTRAIN_NODE", "DISTRAIN_JOB", "DISTRAIN_JOB_KEY", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER", *HEAP}
FREE = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"}
"""they must be there; their values are the launcher's to choose"""
LEAKS = {"TORCHELASTIC_SIGNALS_TO_HANDLE", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "CUDA_MODULE_LOADING"}
"""what torchrun and torch set in their own process, not for the ranks"""
GROUP = "import torch; import torch.distributed as dist; dist.init_process_group('gloo')"


def environments(lines: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """What SHOW printed, by rank: arguments, and the variables that the launcher is responsible for."""
    found = sorted(
        json.loads(line[line.index("[", 1 if line.startswith("[rank") else 0) :]) for line in lines
    )
    return [(argv, {k: "free" if k in FREE else v for k, v in env.items()}) for _, argv, env in found]


def test_ranks_find_the_environment_that_torchrun_gives_them(launch: Launch, script: Script) -> None:
    path = script(SHOW)
    argv = ["--nproc-per-node", "2", "--role", "trainer", path, "--lr", "1"]
    job = launch(*argv)
    torchrun = [sys.executable, "-m", "torch.distributed.run", *argv]
    env = dict(job.environ)
    theirs = subprocess.run(torchrun, capture_output=True, text=True, env=env, cwd=job.folder, check=True)
    assert job.wait() == 0
    for (our_argv, our_env), (their_argv, their_env) in zip(
        environments(job.lines), environments(theirs.stdout.splitlines()), strict=True
    ):
        assert our_argv == their_argv == ["--lr", "1"]
        own = {key: our_env.pop(key) for key in OURS}
        assert all(own.values())
        assert our_env == {key: value for key, value in their_env.items() if key not in LEAKS | OURS}


def test_ranks_of_two_nodes_meet_at_the_store_and_reduce(launch: Launch, script: Script) -> None:
    reduce = "x = torch.tensor(10.0 ** rank); dist.all_reduce(x); print('sum', x.item()); dist.destroy_process_group()"
    job = launch("--emulate-nodes", "2", script(f"{GROUP}\n{reduce}"))
    assert job.wait() == 0, job.err
    assert job.out.count(b"sum 11.0") == 2


@pytest.mark.parametrize(
    ("dies", "told"),
    [
        ("sys.exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
        ("elastic.errors.record(lambda: 1/0)()", "exit code 1"),
    ],
)
def test_a_rank_that_dies_does_not_leave_others_hanging_in_a_collective(
    dies: str, told: str, launch: Launch, script: Script, all_gone: AllGone
) -> None:
    group = f"{GROUP}\nimport torch.distributed.elastic.multiprocessing as elastic\ndist.barrier()"
    wait = "while rank == 1 and not os.path.exists('go'): time.sleep(0.01)"
    body = (
        f"print('pid', os.getpid(), flush=True)\n{wait}\nif rank == 1: {dies}\ndist.all_reduce(torch.ones(1))"
    )
    job = launch("--nproc-per-node", "2", script(f"{group}\n{body}\ndist.all_reduce(torch.ones(1))"))
    job.until("pid", times=2)
    (job.folder / "go").touch()
    assert job.wait() == 1
    all_gone(job.pids())
    story = job.err[job.err.index(f"error: rank 1 failed first: {told}") :]
    assert ("ZeroDivisionError: division by zero" in story) == ("record" in dies)


def test_the_store_outlives_the_death_of_rank_0(launch: Launch, script: Script) -> None:
    dies = "import torch, torch.distributed as dist\nif rank == 0: sys.exit()"
    use = "store = next(dist.rendezvous('env://'))[0]; store.set('k', 'v'); print(store.get('k'))"
    job = launch("--nproc-per-node", "2", script(f"{dies}\n{use}"))
    assert job.wait() == 0, job.err
    assert job.lines == ["[rank 1] b'v'"]
