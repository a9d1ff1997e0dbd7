"""From a slot to a blob: the work that flushing threads do, as calm neighbours of the training processes.

An extent is padded, sealed with its checksum and written as soon as it is complete, while others are still being
copied. What was written to one tier goes on to the next from there, not from memory, which is free for the next
snapshot by then.
"""

import ctypes
import os
import platform
import threading
from collections.abc import Callable, Mapping, MutableMapping
from types import TracebackType
from typing import Self

import numpy as np

from distrain.core.clock import Clock, MonotonicClock

from .blob import BlobReader, BlobWriter, seal_extent
from .commit import begin, read_record
from .layout import EXTENT_BYTES, STRIDE, WriterLayout
from .record import WriterRecord
from .storage import Storage, aligned_memory
from .untrusted import Json

NICENESS = 10
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "ppc64le": 273, "s390x": 282}  # numbers of the system call
_IOPRIO_LOWEST_BEST_EFFORT = (2 << 13) | 7
_IOPRIO_WHO_PROCESS = 1


def lower_priority() -> None:
    """Make the calling thread give way to others, on the processor and on the disk, as far as the system lets it."""
    thread = threading.get_native_id()
    try:
        os.setpriority(os.PRIO_PROCESS, thread, NICENESS)
        if number := _IOPRIO_SET.get(platform.machine()):
            ctypes.CDLL(None).syscall(number, _IOPRIO_WHO_PROCESS, thread, _IOPRIO_LOWEST_BEST_EFFORT)
    except OSError:
        return


class Throttle:
    """A bucket of one second's tokens for all threads that write to a tier; 0 bytes a second is no limit."""

    def __init__(self, bytes_per_s: float, *, clock: Clock | None = None) -> None:
        self._rate, self._clock = bytes_per_s, clock or MonotonicClock()
        self._lock = threading.Lock()
        self._free_at = 0.0

    def wait(self, nbytes: int) -> None:
        """Return when ``nbytes`` may be written."""
        if not self._rate:
            return
        with self._lock:
            now = self._clock.monotonic_ns() / 1e9
            self._free_at = max(self._free_at, now - 1.0) + nbytes / self._rate
            pause = self._free_at - now
        if pause > 0:
            self._clock.sleep(pause)


class SlotMemory:
    """The extents of one snapshot in a slot, with the checksums found so far. Threads may share it."""

    def __init__(self, memory: memoryview, layout: WriterLayout) -> None:
        self.layout = layout
        self.capacity = len(memory) // STRIDE
        """extents that fit; with fewer than the layout has, they take turns"""
        self.crcs: MutableMapping[int, int] = {}
        self._memory = memory

    @property
    def streams(self) -> bool:
        """Whether the layout is larger than the slot."""
        return self.layout.num_extents > self.capacity

    def extent(self, index: int) -> memoryview:
        """STRIDE bytes: data, checksum and gap."""
        start = index % self.capacity * STRIDE
        return self._memory[start : start + STRIDE]

    def used(self, index: int) -> int:
        """Bytes of the extent that the layout fills."""
        return min(EXTENT_BYTES, self.layout.nbytes - index * EXTENT_BYTES)

    def sealed(self, index: int) -> memoryview:
        """The extent, complete, with zeros behind the writer's last byte and its checksum behind the data."""
        extent = self.extent(index)
        if index not in self.crcs:
            used = self.used(index)
            if used < EXTENT_BYTES:
                np.frombuffer(extent, np.uint8)[used:EXTENT_BYTES] = 0
            self.crcs[index] = seal_extent(extent)
        return extent


class Identity:
    """What all records of one snapshot of one writer say alike."""

    def __init__(self, *, job: str, step: int, world_size: int, objects: Mapping[str, Json]) -> None:
        self.job, self.step, self.world_size, self.objects = job, step, world_size, objects

    def record(self, layout: WriterLayout, crcs: tuple[int, ...], *, attempt: str) -> WriterRecord:
        """The record of one attempt."""
        return WriterRecord(
            job=self.job,
            step=self.step,
            attempt=attempt,
            writer=layout.writer,
            world_size=self.world_size,
            layout=layout,
            crcs=crcs,
            objects=self.objects,
        )


class Flush:
    """Writes the extents of one snapshot to one tier, in any order, from several threads."""

    def __init__(
        self, storage: Storage, identity: Identity, source: SlotMemory, *, attempt: str, throttle: Throttle
    ) -> None:
        """Raises StorageError as everything here."""
        self._identity, self._source, self._attempt, self._throttle = identity, source, attempt, throttle
        folder = begin(storage, identity.step, attempt)
        self._writer = BlobWriter(storage, folder, source.layout)

    def write(self, extent: int) -> None:
        """Write a complete extent."""
        self._throttle.wait(self._source.used(extent))
        self._writer.write_extent(extent, self._source.sealed(extent))

    def finish(self) -> WriterRecord:
        """Make durable what was written, all of it: the writer is prepared."""
        record = self._identity.record(self._source.layout, self._writer.crcs, attempt=self._attempt)
        self._writer.finish(record)
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)


def promote(
    source: Storage,
    folder: str,
    target: Storage,
    *,
    writer: int,
    attempt: str,
    throttle: Throttle,
    go_on: Callable[[], bool],
) -> WriterRecord | None:
    """Copy one writer's blob of the checkpoint in ``folder`` to another tier, verified; None if told to stop.

    Raises:
        StorageError: one of the media refuses.
        DamageError: what is read is not what was written.
    """
    found = read_record(source, folder, writer)
    buffer = aligned_memory(STRIDE)
    identity = Identity(job=found.job, step=found.step, world_size=found.world_size, objects=found.objects)
    with (
        BlobReader(source, folder, writer=writer, crcs=found.crcs) as blob,
        BlobWriter(target, begin(target, found.step, attempt), found.layout) as copy,
    ):
        for extent in range(found.layout.num_extents):
            if not go_on():
                return None
            throttle.wait(EXTENT_BYTES)
            blob.read(extent, buffer)
            copy.write_extent(extent, buffer)
        record = identity.record(found.layout, copy.crcs, attempt=attempt)
        copy.finish(record)
    return record
