"""Where each byte of a rank's state lies, in its slot of the arena and in its blob on disk alike.

A *writer* is one global rank. The boxes that it writes are packed into a logical run of bytes, which is cut into
extents of 16 MiB. Behind each extent lies its crc32c, and a gap up to the next page::

    logical    |<------ extent 0 ------>|<------ extent 1 ------>|<- extent 2 ->| 0 0 0 |
    physical   |<------ 16 MiB ------->|crc gap|<---- 16 MiB --->|crc gap|<--- 16 MiB -->|crc gap|
                                        4 KiB

so that an extent goes from memory to disk and back with O_DIRECT and without a copy (notes of the format: blob.py).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType

from distrain.core.errors import ConfigError, Problem
from distrain.core.protocols import ShardBox

from .untrusted import LARGEST, Json, array, canonical, integer, integers, record, refuse, text

EXTENT_BYTES = 16 << 20
"""data bytes of an extent: what is read, written and verified at once"""
GAP_BYTES = 4096
"""from the end of an extent's data to the beginning of the next; starts with the crc"""
STRIDE = EXTENT_BYTES + GAP_BYTES

ALIGN_BYTES = 64
PAGE_ALIGN_FROM = 1 << 20
"""boxes from here on begin on a page, so that they can be mapped"""
MAX_DIMS = 64

DTYPES = MappingProxyType(
    {
        **dict.fromkeys(("bool", "uint8", "int8"), 1),
        **dict.fromkeys(
            ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1
        ),
        **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
        **dict.fromkeys(("uint32", "int32", "float32", "complex32"), 4),
        **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
        "complex128": 16,
    }
)
"""bytes of one element, by torch's name"""


def box_bytes(box: ShardBox) -> int:
    """Bytes of the elements of ``box``."""
    return prod(box.shape) * DTYPES[box.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box and where its row-major bytes lie in the writer's logical bytes."""

    box: ShardBox
    offset: int
    nbytes: int


@dataclass(frozen=True)
class WriterLayout:
    """All that one writer writes; pieces do not overlap, in bytes."""

    writer: int
    pieces: tuple[Piece, ...]
    nbytes: int
    """end of the last piece"""

    @property
    def num_extents(self) -> int:
        """Extents that the bytes touch; 0 if there are none."""
        return -(-self.nbytes // EXTENT_BYTES)

    @property
    def slot_bytes(self) -> int:
        """Bytes of memory or disk that the extents take."""
        return self.num_extents * STRIDE

    @cached_property
    def digest(self) -> str:
        """Equal for equal layouts only."""
        return hashlib.blake2b(canonical(self.to_json()), digest_size=16).hexdigest()

    def to_json(self) -> Json:
        """What ``from_json`` reads; a piece is a short list because there are many."""
        pieces = [
            [
                p.box.fqn,
                p.box.dtype,
                list(p.box.global_shape),
                list(p.box.offset),
                list(p.box.shape),
                p.offset,
            ]
            for p in self.pieces
        ]
        return {"writer": self.writer, "nbytes": self.nbytes, "pieces": pieces}

    @classmethod
    def from_json(cls, value: Json) -> "WriterLayout":
        """The layout in a document that is not trusted.

        Raises:
            DamageError: it is not one.
        """
        fields = record(value, "layout", "writer", "nbytes", "pieces")
        layout = cls(
            writer=integer(fields["writer"], "layout.writer", high=2**31),
            nbytes=integer(fields["nbytes"], "layout.nbytes"),
            pieces=tuple(_piece(row) for row in array(fields["pieces"], "layout.pieces")),
        )
        check_bytes([(p.offset, p.nbytes, p.box.fqn) for p in layout.pieces], nbytes=layout.nbytes)
        return layout


def _piece(row: Json) -> Piece:
    fqn, dtype, global_shape, offset, shape, byte_offset = array(row, "a piece", length=6)
    name, kind, whole = checked_tensor(fqn, dtype, global_shape)
    start, size = checked_region(name, whole, offset, shape)
    box = ShardBox(fqn=name, dtype=kind, global_shape=whole, offset=start, shape=size)
    return Piece(box, integer(byte_offset, f"{name}: byte offset"), box_bytes(box))


def checked_tensor(fqn: Json, dtype: Json, global_shape: Json) -> tuple[str, str, tuple[int, ...]]:
    """A tensor's name, type and shape that are not trusted, or DamageError."""
    name = text(fqn, "a tensor's name")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        refuse(f"{name}: dtype", dtype, ", ".join(DTYPES))
    whole = integers(global_shape, f"{name}: global shape")
    if len(whole) > MAX_DIMS or prod(n for n in whole if n) * DTYPES[dtype] > LARGEST:
        refuse(f"{name}: global shape", whole, f"at most {MAX_DIMS} dims and {LARGEST} bytes")
    return name, dtype, whole


def checked_region(
    name: str, whole: tuple[int, ...], offset: Json, shape: Json
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of a box that are not trusted, or DamageError."""
    if not _fits(whole, offset, shape):
        shown = f"offset {offset!r:.50}, shape {shape!r:.50}"
        refuse(f"{name}: a box", shown, f"within the global shape {whole}")
    return tuple(offset), tuple(shape)


def _fits(whole: tuple[int, ...], offset: Json, shape: Json) -> bool:
    """Plain, because a manifest may have a million boxes."""
    if type(offset) is not list or type(shape) is not list or not len(offset) == len(shape) == len(whole):
        return False
    for start, size, total in zip(offset, shape, whole, strict=True):
        if type(start) is not int or type(size) is not int or start < 0 or size < 0 or start + size > total:
            return False
    return True


def check_bytes(runs: Sequence[tuple[int, int, str]], *, nbytes: int) -> None:
    """Refuse runs (offset, nbytes, name) of a writer that overlap, leave its ``nbytes`` or are not aligned."""
    end, before = 0, ""
    for offset, size, name in sorted(run for run in runs if run[1]):
        if offset % ALIGN_BYTES or offset + size > nbytes:
            refuse(f"{name}: bytes", f"{size} at {offset}", f"aligned to {ALIGN_BYTES}, within {nbytes}")
        if offset < end:
            refuse(f"{name}: bytes", f"{size} at {offset}", f"no overlap with {before}, which ends at {end}")
        end, before = offset + size, name


def pack(writer: int, boxes: Sequence[ShardBox]) -> WriterLayout:
    """Lay ``boxes`` one behind the other in their order.

    Raises:
        ConfigError: a dtype that the format does not know; lists all.
    """
    if unknown := [box for box in boxes if box.dtype not in DTYPES]:
        raise ConfigError.of(
            Problem(f"{box.fqn} has a dtype that cannot be saved", got=box.dtype, allowed=", ".join(DTYPES))
            for box in unknown
        )
    pieces, end = [], 0
    for box in boxes:
        size = box_bytes(box)
        align = GAP_BYTES if size >= PAGE_ALIGN_FROM else ALIGN_BYTES
        offset = -(-end // align) * align
        pieces.append(Piece(box, offset, size))
        end = offset + size
    return WriterLayout(writer, tuple(pieces), end)


def segments(offset: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
    """Where logical bytes ``offset`` to ``offset + nbytes`` lie: (physical offset, bytes before, length)."""
    done = 0
    while done < nbytes:
        extent, inside = divmod(offset + done, EXTENT_BYTES)
        length = min(nbytes - done, EXTENT_BYTES - inside)
        yield extent * STRIDE + inside, done, length
        done += length
