"""Finding what a rank has left behind: every process of its session, whoever its parent is by now."""

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path


def survivors(sessions: Collection[int]) -> list[int]:
    """Living processes of ``sessions`` (named by their leaders), zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = stat.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(session) in sessions and state not in ("Z", "X"):
                found.append(int(stat.parent.name))
    return found
