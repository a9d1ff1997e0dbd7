"""`distrain launch` starts one keeper a node for ranks that ask for it, and waits for its last writes."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrain.launch import sidecar
from distrain.launch.signals import Signals
from helpers.keepers import ROOT, alive, committed, is_saved, until

pytestmark = pytest.mark.processes
Launch = Callable[..., Any]
Script = Callable[[str], str]
Until = Callable[[Callable[[], object], str], None]

SAVE = f"""
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from helpers.keepers import Keepers, config_of, local
folder, world = Path(sys.argv[1]), int(os.environ['WORLD_SIZE'])
node, nodes = int(os.environ['GROUP_RANK']), int(os.environ['GROUP_WORLD_SIZE'])
keepers = Keepers(folder, os.environ)
me = keepers.rank(config_of(local(folder)), rank=rank, world_size=world, node_rank=node, num_nodes=nodes)
print('keeper', me.client.status()['pid'], flush=True)
me.save(1)
"""


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the launcher's sockets are."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder / "distrain"


def keepers_of(job: Any) -> set[int]:
    return {int(pid) for pid in re.findall(rb"keeper (\d+)", job.out)}


@pytest.mark.parametrize("nodes", [1, 2])
def test_ranks_find_one_keeper_a_node_and_what_they_save_is_on_disk_at_the_end(
    launch: Launch, script: Script, runtime: Path, tmp_path: Path, nodes: int
) -> None:
    env = {"XDG_RUNTIME_DIR": str(runtime.parent)}
    leave = "me.client.wait(1, level='protected', timeout_s=30); me.client.close(flush=False)"
    argv = ["--nproc-per-node", "2", "--emulate-nodes", str(nodes), script(f"{SAVE}\n{leave}"), str(tmp_path)]
    job = launch(*argv, env=env)
    assert job.wait() == 0, job.err
    found = keepers_of(job)
    assert len(found) == nodes
    assert is_saved(str(tmp_path / "local"), 1, world_size=2 * nodes)
    assert not any(alive(pid) for pid in found)
    assert os.listdir(runtime) == []


def test_what_ranks_have_sealed_is_written_though_they_crash(
    launch: Launch, script: Script, runtime: Path, tmp_path: Path
) -> None:
    crash = "me.client.wait(1, level='protected', timeout_s=30); os.kill(os.getpid(), signal.SIGKILL)"
    env = {"XDG_RUNTIME_DIR": str(runtime.parent)}
    job = launch("--nproc-per-node", "2", script(f"{SAVE}\n{crash}"), str(tmp_path), env=env)
    assert job.wait() == 1
    assert is_saved(str(tmp_path / "local"), 1, world_size=2)
    assert os.listdir(runtime) == []


def test_a_keeper_outlives_a_killed_launcher_until_it_has_written_everything(
    launch: Launch, script: Script, runtime: Path, tmp_path: Path
) -> None:
    stay = "me.client.wait(1, level='protected', timeout_s=30); print('ready', flush=True); time.sleep(60)"
    env = {"XDG_RUNTIME_DIR": str(runtime.parent)}
    job = launch("--nproc-per-node", "2", script(f"{SAVE}\n{stay}"), str(tmp_path), env=env)
    job.until("ready", times=2)
    (pid,) = keepers_of(job)
    job.send(signal.SIGKILL)
    job.wait()
    until(lambda: not alive(pid), "end of the keeper")
    assert set(committed(str(tmp_path / "local"))) == {1}
    assert os.listdir(runtime) == []


def test_a_killed_keeper_is_started_again_by_the_launcher(
    launch: Launch, script: Script, runtime: Path, tmp_path: Path
) -> None:
    again = """
pid = me.client.status()['pid']
os.kill(pid, signal.SIGKILL)
from helpers.keepers import until
from distrain.core.sidecar_client import KeeperLost
def other():
    try:
        return me.client.status()['pid'] != pid
    except KeeperLost:
        return False
until(other, 'another keeper')
print('parent', open(f"/proc/{me.client.status()['pid']}/stat").read().split()[3] == str(os.getppid()), flush=True)
me.save(2)
me.client.close(flush=True)
"""
    env = {"XDG_RUNTIME_DIR": str(runtime.parent)}
    job = launch(script(SAVE + again), str(tmp_path), env=env)
    assert job.wait() == 0, job.err
    assert b"parent True" in job.out and "the keeper ended" in job.err
    assert is_saved(str(tmp_path / "local"), 2)


def test_a_job_that_saves_nothing_starts_no_keeper_and_leaves_nothing(
    launch: Launch, script: Script, runtime: Path
) -> None:
    look = "print(sorted(os.listdir(os.environ['XDG_RUNTIME_DIR'] + '/distrain')))"
    job = launch(script(look), env={"XDG_RUNTIME_DIR": str(runtime.parent)})
    assert job.wait() == 0, job.err
    assert b".sock" in job.out and b".log" not in job.out  # a keeper would have opened its log
    assert os.listdir(runtime) == []


def test_a_runtime_folder_that_cannot_be_trusted_costs_the_keeper_and_not_the_job(
    launch: Launch, script: Script, runtime: Path
) -> None:
    runtime.mkdir(mode=0o755)
    runtime.chmod(0o755)
    job = launch(script("print('works')"), env={"XDG_RUNTIME_DIR": str(runtime.parent)})
    assert job.wait() == 0
    assert b"works" in job.out and "ranks will have no keeper" in job.err


class Waiting:
    """Of a node's home, what starts a keeper: one that waits for another node until it is told not to."""

    keeper: "subprocess.Popen[bytes]"

    def start(self, listener: socket.socket, *, tcp: socket.socket | None, lease: int) -> Any:
        self.keeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        return self.keeper


def test_a_keeper_is_not_waited_for_that_waits_for_a_node_that_is_lost(until: Until) -> None:
    """The next launch can begin; whatever only the lost node's keeper could have had written is lost with it."""
    home: Any = Waiting()
    with socket.create_server(("127.0.0.1", 0)) as listener, Signals() as arrived:
        starter = sidecar._Starter(home, [listener], with_members=False)
        with socket.create_connection(listener.getsockname()):
            until(lambda: hasattr(home, "keeper"), "a keeper")
            starter.finish(arrived, is_stranded=True)
        starter.close()
    assert home.keeper.wait() == -signal.SIGTERM
