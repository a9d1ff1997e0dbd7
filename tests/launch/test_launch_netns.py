"""Emulated nodes with networks of their own: apart, connected, and gone without a trace however the job ends."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrain.core import netns
from distrain.faults.inject.cgroups import find_controller
from distrain.launch import emulate, network
from distrain.launch.signals import Signals
from helpers.networks import are_left, child_of, groups_of, need_networks

pytestmark = pytest.mark.processes
Launch = Callable[..., Any]
Script = Callable[[str], str]
AllGone = Callable[[list[int]], None]
Until = Callable[[Callable[[], object], str], None]

NODES = ["--emulate-nodes", "2", "--netns"]
SLEEP = "print('pid', os.getpid(), flush=True); time.sleep(100)"
GREET = """
import socket
from distrain.core import netns
address, inode = os.environ["MASTER_ADDR"], os.stat("/proc/self/ns/net").st_ino
if rank == 0:
    with socket.create_server((address, 7000)) as server:
        other, (host, _) = server.accept()
else:
    while True:
        try:
            other = socket.create_connection((address, 7000))
            break
        except OSError:
            time.sleep(0.01)
    host = other.getpeername()[0]
other.sendall(b"hello")
print(rank, host, inode, other.recv(5).decode(), os.environ["GLOO_SOCKET_IFNAME"])
"""


@pytest.fixture(autouse=True)
def _networks() -> None:
    need_networks()


def test_each_node_has_a_network_and_a_group_of_its_own_and_reaches_the_other(
    launch: Launch, script: Script
) -> None:
    groups = """
for line in open("/proc/self/cgroup"):
    if "distrain-node" in line:
        print("group", line.strip().rpartition("/")[2])
"""
    job = launch(*NODES, script(GREET + groups))
    assert job.wait() == 0, job.err
    lines = sorted(line.partition("] ")[2].split() for line in job.lines)
    first, second = lines[:2]
    assert first[:2] == ["0", netns.address(1)] and second[:2] == ["1", netns.address(0)]
    inodes = {first[2], second[2], str(os.stat("/proc/self/ns/net").st_ino)}
    assert len(inodes) == 3
    assert first[3:] == second[3:] == ["hello", netns.INTERFACE]
    if find_controller("freezer"):
        assert [line[0] for line in lines[2:]] == ["group", "group"]
        assert lines[2] != lines[3]


def test_a_user_without_privileges_gets_the_same_by_a_user_namespace(script: Script, tmp_path: Path) -> None:
    """Root of a container, which has neither of the rights that namespaces of root need."""
    setpriv = shutil.which("setpriv")
    if not setpriv or os.geteuid():
        pytest.skip("only root can take rights away, with setpriv")
    without = [setpriv, "--bounding-set", "-sys_admin,-net_admin", "--inh-caps", "-all"]
    if subprocess.run(
        [*without, sys.executable, netns.__file__], capture_output=True, check=False
    ).returncode:
        pytest.skip("user namespaces are not allowed here")
    done = subprocess.run(
        [*without, sys.executable, "-m", "distrain", "launch", *NODES, script(GREET)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hello") == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_is_stopped_leaves_nothing(
    signum: int, launch: Launch, script: Script, all_gone: AllGone, until: Until, tmp_path: Path
) -> None:
    """Also nothing of the agents' temporary folders and sockets, and no process that a rank has started."""
    runtime, temporary = tmp_path / "runtime", tmp_path / "temporary"
    for folder in (runtime, temporary):
        folder.mkdir()
    child = "import subprocess; print('pid', subprocess.Popen(['sleep', '100']).pid, flush=True)"
    job = launch(
        *NODES,
        script(f"{child}\n{SLEEP}"),
        env={"XDG_RUNTIME_DIR": str(runtime), "TMPDIR": str(temporary)},
    )
    job.until("pid", times=4)
    assert list(temporary.iterdir())
    namespaces = {os.stat(f"/proc/{pid}/ns/net").st_ino for pid in job.pids()}
    assert len(namespaces) == 2
    groups = groups_of(job.pids())
    job.send(signum)
    assert job.wait() == (-signum if signum == signal.SIGKILL else 128 + signum)
    all_gone(job.pids())
    until(lambda: not are_left(groups), "end of the control groups")
    until(lambda: not namespaces & living_namespaces(), "end of the networks")
    until(lambda: not list(temporary.iterdir()), f"end of {list(temporary.iterdir())}")
    until(lambda: not leftover_sockets(runtime), f"end of {leftover_sockets(runtime)}")


def leftover_sockets(runtime: Path) -> list[Path]:
    return list(runtime.glob("distrain/*"))


def living_namespaces() -> set[int]:
    """Networks in which a process is."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(path.stat().st_ino)
        except OSError:
            continue
    return found


def test_the_loss_of_the_network_ends_the_job(launch: Launch, script: Script, all_gone: AllGone) -> None:
    job = launch(*NODES, script(SLEEP))
    job.until("pid", times=2)
    groups = groups_of(job.pids())
    os.kill(child_of(job.process.pid, b"distrain.launch.switch"), signal.SIGKILL)
    assert job.wait() == 1
    all_gone(job.pids())
    assert "the network of the emulated nodes is gone" in job.err
    assert not are_left(groups)


class Dying(network.Network):
    """Of a network, the process that carries the packets: it dies just when everything else is over."""

    def __init__(self) -> None:
        self.switch = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        self.switch.poll = self._die  # type: ignore[method-assign]

    def _die(self) -> int:
        os.kill(self.switch.pid, signal.SIGKILL)
        return -signal.SIGKILL

    def close(self) -> None:
        self._die()
        self.switch.wait()


def test_a_network_that_ends_with_the_job_leaves_no_descriptor_open() -> None:
    with Dying() as dying, Signals() as arrived:
        before = sorted(os.listdir("/proc/self/fd"))
        assert emulate._wait([subprocess.Popen([sys.executable, "-c", ""])], arrived, dying) == [0]
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_what_nobody_could_take_away_the_next_run_does(
    launch: Launch, script: Script, all_gone: AllGone
) -> None:
    """Launcher and network are killed at once."""
    job = launch(*NODES, script(SLEEP))
    job.until("pid", times=2)
    groups = groups_of(job.pids())
    for pid in (child_of(job.process.pid, b"distrain.launch.switch"), job.process.pid):
        os.kill(pid, signal.SIGKILL)
    job.wait()
    all_gone(job.pids())
    assert launch(*NODES, script("print('ran')")).wait() == 0
    assert not are_left(groups)


def test_what_makes_no_sense_is_refused(launch: Launch, script: Script) -> None:
    path = script("print('ran')")
    alone = launch("--netns", path)
    addressed = launch(*NODES, "--master-addr", "10.0.0.1", "--master-port", "1", path)
    assert [job.wait() for job in (alone, addressed)] == [3, 3]
    assert "--netns is for emulated nodes" in alone.err and "--emulate-nodes 2" in alone.err
    assert "gives the nodes their addresses itself" in addressed.err


def test_missing_rights_are_named_with_the_way_to_get_them(script: Script) -> None:
    setpriv = shutil.which("setpriv")
    if not setpriv or os.geteuid():
        pytest.skip("only root can take rights away, with setpriv")
    without = [setpriv, "--bounding-set", "-all", "--inh-caps", "-all"]
    done = subprocess.run(
        [*without, sys.executable, "-m", "distrain", "launch", *NODES, script("print('ran')")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert (done.returncode, done.stdout) == (3, "")
    for text in ("networks of their own", "Operation not permitted", "user namespaces", "/dev/net/tun"):
        assert text in done.stderr
