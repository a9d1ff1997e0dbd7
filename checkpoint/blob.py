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
from .storage import Source, Storage

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
        storage.remove(f"{folder}/data/{layout.writer}")  # its record would vouch for what is overwritten now
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
    """Reads the extents of a blob, each verified; from any thread. Opening it checks size and index."""

    def __init__(self, storage: Storage, folder: str, *, writer: int, crcs: tuple[int, ...]) -> None:
        self._path, self._crcs = data_path(folder, writer), crcs
        self._source = storage.source(self._path)
        try:
            check_ends(self._source, len(crcs), what=self._path)
        except BaseException:
            self._source.__exit__(None, None, None)
            raise

    def read(self, extent: int, buffer: memoryview) -> memoryview:
        """The EXTENT_BYTES of an extent, in ``buffer``: page-aligned memory of that size or, better, of STRIDE.

        Raises:
            DamageError: they are not what was written.
        """
        return read_extent(self._source, extent, buffer, crc=self._crcs[extent], what=self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.__exit__(kind, error, trace)


def check_ends(source: Source, num_extents: int, *, what: str) -> None:
    """Refuse, by DamageError, a blob of another size, or with another index, than ``num_extents`` have."""
    start, tail = num_extents * STRIDE, tail_of(num_extents)
    if source.nbytes != start + len(tail):
        raise DamageError(
            f"{what} has another size",
            got=f"{source.nbytes} bytes",
            allowed=f"{start + len(tail)} bytes for {num_extents} extents",
        )
    found = bytearray(len(tail))
    source.read(start, memoryview(found))
    if found != tail:
        raise DamageError(f"{what}: the index at byte {start} is damaged")


def read_extent(source: Source, extent: int, buffer: memoryview, *, crc: int, what: str) -> memoryview:
    """The data of an extent whose checksum is ``crc``; with a buffer of STRIDE, that behind the data is checked too.

    Raises:
        DamageError: they are not what was written.
    """
    start = extent * STRIDE
    hit("checkpoint.read", path=what, extent=extent)
    whole = buffer[: STRIDE if len(buffer) >= STRIDE else EXTENT_BYTES]
    source.read(start, whole)
    data = whole[:EXTENT_BYTES]
    found = crc32c(data)
    behind = sealed_crc(whole) if len(whole) == STRIDE else crc
    if found == behind == crc:
        return data
    where = f"{what}: extent {extent} (bytes {start} to {start + EXTENT_BYTES})"
    fault = "is damaged" if found != crc else "is sound, but the checksum behind it is damaged"
    raise DamageError(
        f"{where} {fault}", got=f"{found:08x}, {behind:08x} stored", allowed=f"crc32c {crc:08x}"
    )
