"""One writer's bytes as one file, which is at the same time a shard of a zarr array (zarr v3, sharding_indexed)::

    | extent 0 | crc gap | extent 1 | crc gap | ... | index | crc |

An extent and its checksum are one chunk to zarr, and the gap behind them is nobody's, so that extents begin on pages
and go from memory to disk as they lie. The index follows from the number of extents; what it says is checked, never
followed. Checksums are compared with those of the manifest, which also tells an extent from another one that is
sound but does not belong there.
"""

import struct
import threading
from types import TracebackType
from typing import Self

import numpy as np

from distrain.core.failpoints import hit

from .crc import crc32c
from .errors import DamageError
from .layout import EXTENT_BYTES, GAP_BYTES, STRIDE, WriterLayout
from .record import CRC_BYTES, WriterRecord, index_of, record_document
from .storage import Storage

_PAGE = GAP_BYTES


def data_path(folder: str, writer: int) -> str:
    """The blob of ``writer`` below a checkpoint's folder."""
    return f"{folder}/data/{writer}/0"


def record_path(folder: str, writer: int) -> str:
    """The record of ``writer`` below a checkpoint's folder."""
    return f"{folder}/data/{writer}/zarr.json"


def tail_of(num_extents: int) -> bytes:
    """What follows the extents: the index and its checksum."""
    index = index_of(num_extents)
    return index + struct.pack("<I", crc32c(index))


def seal_extent(extent: memoryview) -> int:
    """Put the checksum of an extent (STRIDE bytes of a slot) behind its data; returns it."""
    crc = crc32c(extent[:EXTENT_BYTES])
    extent[EXTENT_BYTES : EXTENT_BYTES + CRC_BYTES] = struct.pack("<I", crc)
    return crc


def sealed_crc(extent: memoryview) -> int:
    """The checksum behind the data of a sealed extent."""
    return int.from_bytes(extent[EXTENT_BYTES : EXTENT_BYTES + CRC_BYTES], "little")


class BlobWriter:
    """Writes a blob into the folder of a checkpoint that has begun; the extents in any order, from any thread."""

    def __init__(self, storage: Storage, folder: str, layout: WriterLayout) -> None:
        self._storage, self._folder, self._layout = storage, folder, layout
        self._crcs: dict[int, int] = {}
        self._lock = threading.Lock()
        storage.make_folder(f"{folder}/data/{layout.writer}")
        padding = layout.num_extents * EXTENT_BYTES - layout.nbytes
        self._sink = storage.sink(data_path(folder, layout.writer), nbytes=layout.slot_bytes - padding)

    def write_extent(self, index: int, extent: memoryview) -> None:
        """Write STRIDE bytes, sealed; zeros behind the writer's last byte become a hole in the file."""
        start = index * STRIDE
        hit("checkpoint.extent", writer=self._layout.writer, extent=index)
        used = min(EXTENT_BYTES, -(-(self._layout.nbytes - index * EXTENT_BYTES) // _PAGE) * _PAGE)
        if used < EXTENT_BYTES and not np.frombuffer(extent[used:EXTENT_BYTES], np.uint8).any():
            self._sink.write(start, extent[:used])
            self._sink.write(start + EXTENT_BYTES, extent[EXTENT_BYTES:STRIDE])
        else:
            self._sink.write(start, extent[:STRIDE])
        with self._lock:
            self._crcs[index] = sealed_crc(extent)

    @property
    def crcs(self) -> tuple[int, ...]:
        """Checksums of all extents; they must have been written.

        Raises:
            ValueError: one is missing.
        """
        expected = range(self._layout.num_extents)
        if missing := [index for index in expected if index not in self._crcs]:
            raise ValueError(f"writer {self._layout.writer}: extents {missing} were not written")
        return tuple(self._crcs[index] for index in expected)

    def finish(self, record: WriterRecord) -> None:
        """Make the blob durable, and then the record that says so: this writer is prepared."""
        if record.layout != self._layout or record.crcs != self.crcs:
            raise ValueError(f"writer {record.writer}: the record is of other bytes")
        writer, num_extents = record.writer, self._layout.num_extents
        hit("checkpoint.index", writer=writer)
        end, tail = num_extents * STRIDE, tail_of(num_extents)
        self._sink.write(end, memoryview(tail))
        self._sink.finish(nbytes=end + len(tail))
        hit("checkpoint.record", writer=writer)
        self._storage.write(record_path(self._folder, writer), record_document(record))
        for folder in (f"{self._folder}/data/{writer}", f"{self._folder}/data", self._folder):
            self._storage.sync(folder)
        hit("checkpoint.prepared", writer=writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sink.__exit__(kind, error, trace)


class BlobReader:
    """Reads the extents of a blob, each verified; from any thread."""

    def __init__(self, storage: Storage, folder: str, *, writer: int, crcs: tuple[int, ...]) -> None:
        self.path = data_path(folder, writer)
        """below the storage's root"""
        self._crcs = crcs
        self._source = storage.source(self.path)
        try:
            self._check_ends()
        except BaseException:
            self._source.__exit__(None, None, None)
            raise

    def _check_ends(self) -> None:
        tail, start = tail_of(len(self._crcs)), len(self._crcs) * STRIDE
        if self._source.nbytes != start + len(tail):
            raise DamageError(
                f"{self.path} has another size",
                got=f"{self._source.nbytes} bytes",
                allowed=f"{start + len(tail)} bytes for {len(self._crcs)} extents",
            )
        found = bytearray(len(tail))
        self._source.read(start, memoryview(found))
        if found != tail:
            raise DamageError(f"{self.path}: the index at byte {start} is damaged")

    def read(self, extent: int, buffer: memoryview) -> memoryview:
        """The EXTENT_BYTES of an extent, in ``buffer``: page-aligned memory of that size or, better, of STRIDE.

        Raises:
            DamageError: they are not what was written.
        """
        hit("checkpoint.read", path=self.path, extent=extent)
        size = STRIDE if len(buffer) >= STRIDE else EXTENT_BYTES
        self._source.read(extent * STRIDE, buffer[:size])
        data, expected = buffer[:EXTENT_BYTES], self._crcs[extent]
        found = crc32c(data)
        stored = sealed_crc(buffer) if size == STRIDE else expected
        if found != expected or stored != expected:
            where = (
                f"{self.path}: extent {extent} (bytes {extent * STRIDE} to {extent * STRIDE + EXTENT_BYTES})"
            )
            what = "is damaged" if found != expected else "has a damaged checksum behind it"
            raise DamageError(
                f"{where} {what}", got=f"crc32c {found:08x}, {stored:08x} stored", allowed=f"{expected:08x}"
            )
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.__exit__(kind, error, trace)
