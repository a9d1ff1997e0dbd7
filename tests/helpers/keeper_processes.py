"""Keepers outlive the trainers that started them: tests find theirs by the runtime folder that they gave it."""

import os
import signal
import time
from pathlib import Path


def keepers_of(runtime: Path) -> list[int]:
    """Process ids of the keepers whose runtime folder is ``runtime``."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if b"distrain.sidecar" not in (folder / "cmdline").read_bytes():
                continue
            if f"XDG_RUNTIME_DIR={runtime}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill_keepers(runtime: Path, *, within_s: float = 10.0) -> int:
    """Kill them, wait until they are gone, and return how many there were."""
    victims = keepers_of(runtime)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + within_s
    while keepers_of(runtime) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not keepers_of(runtime)
    return len(victims)
