"""Signals reach the ranks; no end of the launcher, not even SIGKILL, leaves anything behind."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrain.launch.tether import tethered

pytestmark = pytest.mark.processes
Launch = Callable[..., Any]
Script = Callable[[str], str]
AllGone = Callable[[list[int]], None]

SLEEP = "print('pid', os.getpid(), flush=True)\nwhile True: time.sleep(0.01)"


@pytest.mark.parametrize("nodes", [[], ["--emulate-nodes", "2"]])
def test_a_user_signal_reaches_every_rank_and_the_job_goes_on(
    nodes: list[str], launch: Launch, script: Script
) -> None:
    catch = "got = []\nfor each in (signal.SIGUSR1, signal.SIGUSR2): signal.signal(each, lambda n, _: got.append(n))"
    path = script(
        f"{catch}\nprint('ready', flush=True)\nwhile len(got) < 2: time.sleep(0.01)\nprint('got', sorted(got))"
    )
    job = launch("--nproc-per-node", "2", *nodes, path)
    job.until("ready", times=4 if nodes else 2)
    job.send(signal.SIGUSR1)
    job.send(signal.SIGUSR2)
    assert job.wait() == 0
    assert job.out.count(b"got [10, 12]") == (4 if nodes else 2)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_stop_reaches_every_rank_and_gives_the_exit_code(
    signum: int, launch: Launch, script: Script, all_gone: AllGone
) -> None:
    catch = f"def bye(n, _): print('bye', n, flush=True); sys.exit()\nsignal.signal({int(signum)}, bye)"
    job = launch("--nproc-per-node", "2", script(f"{catch}\n{SLEEP}"))
    job.until("pid", times=2)
    job.send(signum)
    assert job.wait() == 128 + signum
    assert job.out.count(f"bye {int(signum)}".encode()) == 2
    assert f"stopped by {signal.Signals(signum).name}" in job.err
    all_gone(job.pids())


def test_ctrl_c_escalates_from_sigint_to_sigterm_to_sigkill(launch: Launch, script: Script) -> None:
    ignore = "for each in (2, 15): signal.signal(each, lambda n, _: print('got', n, flush=True))"
    job = launch("--nproc-per-node", "2", "--shutdown-timeout", "0.5", script(f"{ignore}\n{SLEEP}"))
    job.until("pid", times=2)
    job.send(signal.SIGINT)
    assert job.wait() == 130
    assert [job.out.count(b"got 2"), job.out.count(b"got 15")] == [2, 2]


def test_a_second_ctrl_c_does_not_wait(launch: Launch, script: Script) -> None:
    ignore = "for each in (2, 15): signal.signal(each, lambda n, _: print('got', n, flush=True))"
    job = launch("--nproc-per-node", "2", "--shutdown-timeout", "1000", script(f"{ignore}\n{SLEEP}"))
    job.until("pid", times=2)
    for expected in ("got 2", "got 15", ""):
        job.send(signal.SIGINT)
        job.until(expected, times=2)
    assert job.wait() == 130


@pytest.mark.parametrize("nodes", [[], ["--emulate-nodes", "2"]])
def test_a_killed_launcher_leaves_no_rank_no_store_and_no_grandchild(
    nodes: list[str], launch: Launch, all_gone: AllGone
) -> None:
    shell = "echo pid $$; sleep 1000 & echo pid $!; wait"
    job = launch("--nproc-per-node", "2", *nodes, "--no-python", "sh", "-c", shell)
    job.until("pid", times=8 if nodes else 4)
    job.send(signal.SIGKILL)
    job.wait()
    all_gone(job.pids())  # the store and the reapers are found by the check after every test


def test_a_rank_that_is_started_by_a_dead_launcher_does_not_run() -> None:
    command = tethered(["sh", "-c", "echo ran"])
    command[command.index(str(os.getpid()))] = str(os.getppid())  # as if that one had died meanwhile
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""


PARENT = """
import subprocess, sys
from distrain.launch.tether import tethered
print(subprocess.Popen(tethered(["sleep", "1000"])).pid, flush=True)
sys.stdin.read()
"""


def test_the_kernel_kills_a_tethered_process_with_its_parent(
    all_gone: AllGone, until: Callable[..., None]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        command = Path(f"/proc/{child}/cmdline")
        until(lambda: command.read_bytes().startswith(b"sleep"), "the exec")
        parent.kill()
        all_gone([child])


def test_the_loss_of_the_store_ends_the_job(launch: Launch, script: Script, all_gone: AllGone) -> None:
    job = launch("--nproc-per-node", "2", script(SLEEP))
    job.until("pid", times=2)
    children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text().split()
    store = [pid for pid in children if b"distrain.launch.store" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(store) == 1
    os.kill(int(store[0]), signal.SIGKILL)
    assert job.wait() == 1
    all_gone(job.pids())
    assert "error: the rendezvous store ended" in job.err
