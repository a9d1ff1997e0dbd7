"""Tests that leave things behind, on purpose: test_leaks.py runs this file and expects its failures."""

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distrain.core.failpoints import FAILPOINTS
from helpers import leaks

leaks.GRACE_S = 0.5
SHARED = Path("/dev/shm") / f"distrain-leaky-{uuid.uuid4().hex}"
SLEEP = ["sleep", "1000"]


def detached() -> int:
    """A process in a session of its own whose parent is gone."""
    code = f"import subprocess as s; print(s.Popen({SLEEP}, start_new_session=True, stdout=s.DEVNULL).pid)"
    return int(subprocess.check_output([sys.executable, "-W", "ignore", "-c", code]))


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


Leak = tuple[Callable[[], Any], Callable[[Any], bool]]  # how to leave it, and whether it is still there
LEAKS: dict[str, Leak] = {
    "child": (lambda: subprocess.Popen(SLEEP), lambda process: process.wait(10) != -9),
    "detached": (detached, is_alive),
    "unmarked": (lambda: subprocess.Popen(SLEEP, env={}), lambda process: process.wait(10) != -9),
    "shared": (SHARED.touch, lambda _: SHARED.exists()),
    "failpoint": (
        lambda: FAILPOINTS.arm("some.point", OSError("broken")),
        lambda _: bool(FAILPOINTS.names()),
    ),
    "group": (
        lambda: dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1),
        lambda _: dist.is_initialized(),
    ),
}
left: dict[str, Any] = {}


@pytest.mark.parametrize("kind", LEAKS)
def test_leaves(kind: str) -> None:
    left[kind] = LEAKS[kind][0]()


@pytest.mark.parametrize("kind", LEAKS)
def test_is_gone(kind: str) -> None:
    assert not LEAKS[kind][1](left[kind])


def test_ends_soon() -> None:
    left["brief"] = subprocess.Popen(["sleep", "0.1"])


@pytest.fixture(scope="module")
def server() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(SLEEP) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("turn", [1, 2])
def test_wider_fixture(server: "subprocess.Popen[bytes]", turn: int) -> None:
    assert server.poll() is None


def test_thread() -> None:
    threading.Thread(target=threading.Event().wait, name="distrain-forgotten", daemon=True).start()


def test_own_pid_is_no_leak() -> None:
    assert os.getpid() not in leaks.processes()
