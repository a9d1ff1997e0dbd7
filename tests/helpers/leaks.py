"""Pytest plugin: a test that leaves something behind fails, whichever test it would have disturbed later.

Looked for after each test: processes, threads of ours, files in /dev/shm, armed failpoints, a process group. What
fixtures of a wider scope hold was there before the test and does not count.

Processes are found by an environment variable that every one of them inherits, however far it detached itself, and
by descent, whatever it did to its environment.
"""

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GRACE_S = 3.0  # what was told to end may still be ending
MARK = "DISTRAIN_TEST_SESSION"
SHARED_MEMORY = Path("/dev/shm")
PROC = Path("/proc")
SERVERS = (b"multiprocessing.forkserver", b"multiprocessing.resource_tracker")  # one a session, on purpose


def pytest_configure() -> None:
    """Mark all processes that this session will start."""
    os.environ[MARK] = uuid.uuid4().hex


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    checks: dict[str, Callable[[], set[str]]] = {
        "process": lambda: {f"{pid} {name}" for pid, name in processes().items()},
        "thread": lambda: {
            thread.name for thread in threading.enumerate() if thread.name.startswith("distrain")
        },
        "shared memory": _shared_memory,
        "armed failpoint": _failpoints,
        "process group": _process_group,
    }
    before = {kind: look() for kind, look in checks.items()}
    yield
    deadline = time.monotonic() + GRACE_S
    while left := {kind: new for kind, look in checks.items() if (new := look() - before[kind])}:
        if time.monotonic() > deadline:
            _clean_up(left)
            lines = [f"  {kind}: {name}" for kind, names in left.items() for name in sorted(names)]
            pytest.fail("\n".join(["the test left behind:", *lines]), pytrace=False)
        time.sleep(0.02)


def _clean_up(left: dict[str, set[str]]) -> None:
    """Take away what was found, so that one test fails and not all that follow."""
    for process in left.get("process", ()):
        os.kill(int(process.split()[0]), signal.SIGKILL)
    for name in left.get("shared memory", ()):
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    for name in left.get("armed failpoint", ()):
        sys.modules["distrain.core.failpoints"].FAILPOINTS.disarm(name)
    if left.get("process group"):
        sys.modules["torch.distributed"].destroy_process_group()


def processes() -> dict[int, str]:
    """Command lines of the living processes that this session has started, without the servers of multiprocessing."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    parents: dict[int, int] = {}
    commands: dict[int, bytes] = {}
    marked: set[int] = set()
    for entry in PROC.iterdir():
        if not entry.name.isdecimal():
            continue
        pid = int(entry.name)
        try:
            state, parent = (entry / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                parents[pid] = int(parent)
                commands[pid] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").strip()
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    marked.add(pid)
        except OSError:  # gone meanwhile, or another user's
            continue
    ours = marked | _descendants(parents, os.getpid())
    return {
        pid: commands.get(pid, b"").decode(errors="replace")[:200]
        for pid in ours - {os.getpid()}
        if not (parents[pid] == os.getpid() and any(server in commands.get(pid, b"") for server in SERVERS))
    }


def _descendants(parents: dict[int, int], root: int) -> set[int]:
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _shared_memory() -> set[str]:
    """Our files in /dev/shm, without those that processes of other sessions on this machine have open."""
    names = {path.name for path in SHARED_MEMORY.glob("distrain*")}
    if not names:
        return names
    ours = {str(pid) for pid in (os.getpid(), *processes())}
    used = {
        name for process in PROC.iterdir() if process.name not in ours for name in _opened(process, names)
    }
    return names - used


def _opened(process: Path, names: set[str]) -> set[str]:
    try:
        text = (process / "maps").read_text(errors="replace")
        text += "\n".join(os.readlink(link) for link in (process / "fd").iterdir())
    except OSError:
        return set()
    return {name for name in names if f"{SHARED_MEMORY}/{name}" in text}


def _failpoints() -> set[str]:
    module = sys.modules.get("distrain.core.failpoints")
    return set(module.FAILPOINTS.names()) if module else set()


def _process_group() -> set[str]:
    distributed = sys.modules.get("torch.distributed")
    joined = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return {"still initialized"} if joined else set()
