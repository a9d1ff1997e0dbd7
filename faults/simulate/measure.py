"""Figures of this machine in place of assumed ones: a copy in memory, a write, a read, and a start of Python.

A rough look of a few seconds, to be scaled by the size of the state; ``benchmarks.checkpoint`` measures properly. The
copy goes between buffers that were touched before, as those of a keeper's pool were, and the file is read back
without the page cache.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SAMPLE_BYTES = 256 * 2**20
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Seconds for the state of one node, and for a start."""

    copy_s: float
    write_s: float
    read_s: float
    start_s: float

    def overrides(self) -> dict[str, object]:
        """These as values of a scenario: saves stall for a copy, then go to disk while training goes on."""
        memory = {"name": "memory", "survives": "process", "restore_s": self.copy_s}
        disk = {"name": "disk", "survives": "all", "restore_s": self.read_s, "delay_s": self.write_s}
        return {
            "checkpoint.stall_s": self.copy_s,
            "checkpoint.levels": [memory, disk],
            "recovery.restart_s": self.start_s,
        }


def measure(folder: Path, *, state_bytes: float) -> Measured:
    """Medians of three rounds, and one start; the files in ``folder`` are gone afterwards.

    Raises:
        OSError: ``folder`` cannot be written, or is full.
    """
    scale = state_bytes / SAMPLE_BYTES
    source, target = np.ones(SAMPLE_BYTES, np.uint8), np.zeros(SAMPLE_BYTES, np.uint8)
    rounds = []
    for _ in range(_ROUNDS):
        copy_s = _timed(lambda: np.copyto(target, source))
        with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
            handle = file.fileno()
            write_s = _timed(partial(_write, handle, target))
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            read_s = _timed(partial(_read, handle, target))
        rounds.append((copy_s, write_s, read_s))
    start_s = _timed(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))
    copy_s, write_s, read_s = np.median(rounds, axis=0).tolist()
    return Measured(copy_s=scale * copy_s, write_s=scale * write_s, read_s=scale * read_s, start_s=start_s)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _write(handle: int, data: NDArray[np.uint8]) -> None:
    view = data.data
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done : done + 2**24], done)
    os.fsync(handle)


def _read(handle: int, data: NDArray[np.uint8]) -> None:
    view = data.data
    done = 0
    while done < len(view):
        got = os.preadv(handle, [view[done : done + 2**24]], done)
        if not got:
            raise OSError("the file ended early")
        done += got
