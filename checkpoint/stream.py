"""Writes a writer's blob from pieces that come one after the other, in a few extents of memory.

Training writes whole slots of the arena. Conversions and torch's DCP hand over one tensor after the other instead;
here they fill extents, which are sealed and written by threads while the next one fills.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np

from .blob import BlobWriter, seal_extent
from .layout import STRIDE, Piece, WriterLayout, segments
from .record import WriterRecord
from .storage import Storage, aligned_memory
from .untrusted import Json

_THREADS = 2


class BlobStream:
    """Takes the pieces of ``layout`` in their order. Abandoned unless finished, as a context manager."""

    def __init__(self, storage: Storage, folder: str, layout: WriterLayout) -> None:
        self._layout = layout
        self._blob = BlobWriter(storage, folder, layout)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="write")
        self._buffers = [aligned_memory(STRIDE) for _ in range(min(_THREADS + 1, layout.num_extents))]
        self._writing: list[Future[None] | None] = [None] * len(self._buffers)
        self._extent = 0

    def put(self, piece: Piece, data: memoryview) -> None:
        """The bytes of the next piece; ``data`` may be reused afterwards."""
        if data.nbytes != piece.nbytes:
            raise ValueError(f"{piece.box.fqn}: {data.nbytes} bytes given for a piece of {piece.nbytes}")
        for position, start, length in segments(piece.offset, piece.nbytes):
            extent, inside = divmod(position, STRIDE)
            while self._extent < extent:
                self._flush()
            self._buffers[extent % len(self._buffers)][inside : inside + length] = data[
                start : start + length
            ]

    def finish(
        self, *, job: str, step: int, attempt: str, world_size: int, objects: Mapping[str, Json]
    ) -> WriterRecord:
        """Make blob and record durable: this writer is prepared. All pieces must have been put."""
        while self._extent < self._layout.num_extents:
            self._flush()
        for writing in filter(None, self._writing):
            writing.result()
        record = WriterRecord(
            job, step, attempt, self._layout.writer, world_size, self._layout, self._blob.crcs, objects
        )
        self._blob.finish(record)
        return record

    def _flush(self) -> None:
        """Let a thread write the extent that is full, and make room for the next but one."""
        place = self._extent % len(self._buffers)
        self._writing[place] = self._pool.submit(self._write, self._extent, self._buffers[place])
        self._extent += 1
        place = self._extent % len(self._buffers)
        if (before := self._writing[place]) and self._extent < self._layout.num_extents:
            before.result()
            np.frombuffer(self._buffers[place], np.uint8).fill(0)

    def _write(self, extent: int, buffer: memoryview) -> None:
        seal_extent(buffer)
        self._blob.write_extent(extent, buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._blob.__exit__(kind, error, trace)
