"""What the machine can do at best: a copy between warm buffers, and the disk past the page cache.

Pieces and threads are those of the checkpoints: 16 MiB, two at a time. Nothing is checked, named or committed.
"""

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from distrain.checkpoint.layout import EXTENT_BYTES
from distrain.checkpoint.storage import aligned_memory

from .base import Job, Training

NUM_THREADS = 2


class Raw:
    """Takes turns like a contender; each gives ``memcpy_s``, ``write_s`` and ``read_s`` for the job's bytes."""

    def __init__(self, job: Job, folder: Path) -> None:
        torch.set_num_threads(1)
        folder.mkdir(parents=True)
        self._folder = folder
        self._sources = list(Training(job).tensors().values())
        self._nbytes = -(-job.nbytes // EXTENT_BYTES) * EXTENT_BYTES
        self._scale = job.nbytes / self._nbytes
        self._memory = aligned_memory(self._nbytes)
        self._pool = ThreadPoolExecutor(NUM_THREADS)
        self._copy()  # first touch

    def turn(self) -> dict[str, float]:
        """Seconds of each; the disk's are for exactly the job's bytes, from those of whole pieces."""
        path = self._folder / "raw"
        found = {
            "memcpy_s": statistics.median(_timed(self._copy) for _ in range(3)),
            "write_s": _timed(lambda: self._write(path)) * self._scale,
            "read_s": _timed(lambda: self._read(path)) * self._scale,
        }
        path.unlink()
        return found

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _copy(self) -> None:
        start = 0
        for source in self._sources:
            target = torch.frombuffer(
                self._memory, dtype=source.dtype, count=source.numel(), offset=start
            ).view_as(source)
            target.copy_(source)
            start += source.nbytes

    def _write(self, path: Path) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(fd, 0, self._nbytes)
        self._each(lambda piece, at: os.pwrite(fd, piece, at))
        os.fsync(fd)
        os.close(fd)

    def _read(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._each(lambda piece, at: os.preadv(fd, [piece], at))
        os.close(fd)

    def _each(self, call: Callable[[memoryview, int], int]) -> None:
        def run(start: int) -> int:
            return call(self._memory[start : start + EXTENT_BYTES], start)

        if sum(self._pool.map(run, range(0, self._nbytes, EXTENT_BYTES))) != self._nbytes:
            raise OSError("the disk took or gave less than it was asked for")


def make_raw(rank: int, world_size: int, job: Job, folder: Path) -> Raw:
    """What the process of a crew runs."""
    return Raw(job, folder)


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
