"""A checkpoint's tensors as arrays of a zarr group, read-only and without copying anything on disk.

On disk a checkpoint is bytes by writer. This store makes every tensor an array of its own name, shape and type, whose
chunks are assembled, verified, when they are asked for::

    group = zarr.open_group(zarr_view("run/step-00000012"), mode="r")
    group["model.layers.0.weight"][:10]

Where the stored boxes form a regular grid, it is the chunk grid, and a chunk is one run of bytes; otherwise chunks are
some rows. Types that zarr lacks (bfloat16, float8) come as unsigned integers of their size, with torch's name in the
attributes.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from .layout import EXTENT_BYTES
from .locate import locate
from .manifest import Manifest, StoredBox, StoredTensor
from .record import group_document
from .storage import Storage
from .tensors import TensorReader, numpy_dtype
from .untrusted import canonical

LARGEST_CHUNK = 1 << 30


def zarr_view(path: str | Path) -> "CheckpointStore":
    """The store of the checkpoint at ``path`` (its folder, or a root whose newest one is taken).

    Raises:
        DataError: there is no checkpoint, or it is damaged.
    """
    found = locate(path)
    return CheckpointStore(found.storage, found.folder, found.manifest)


class CheckpointStore(Store):
    """A zarr store of arrays that are assembled from a checkpoint."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        super().__init__(read_only=True)
        self._name = f"{storage.name}/{folder}"
        self._manifest = manifest
        self._reader = TensorReader(storage, folder, manifest)
        self._arrays = {node_name(fqn): fqn for fqn in manifest.tensors}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointStore) and self._name == other._name

    def __hash__(self) -> int:
        return hash(self._name)

    def __str__(self) -> str:
        return f"checkpoint://{self._name}"

    def _find(self, key: str) -> Callable[[], bytes] | None:
        """What makes the content of ``key``; None if there is no such key."""
        if key == "zarr.json":
            return partial(_group, self._manifest)
        node, _, rest = key.partition("/")
        if (fqn := self._arrays.get(node)) is None:
            return None
        tensor = self._manifest.tensors[fqn]
        if rest == "zarr.json":
            return partial(_array, fqn, tensor)
        place = _place(rest, grid_shape(tensor))
        return None if place is None else partial(self._chunk, fqn, tensor, place)

    def _chunk(self, fqn: str, tensor: StoredTensor, place: tuple[int, ...]) -> bytes:
        chunk = chunk_shape(tensor)
        offset = [i * size for i, size in zip(place, chunk, strict=True)]
        shape = [min(n, whole - a) for n, whole, a in zip(chunk, tensor.global_shape, offset, strict=True)]
        region = self._reader.read(fqn, offset=offset, shape=shape)
        if list(chunk) != shape:  # a chunk at the edge is as large as the others to zarr
            padded = np.zeros(chunk, region.dtype)
            padded[tuple(slice(n) for n in shape)] = region
            region = padded
        return region.tobytes()

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The content of ``key``, or a part of it."""
        if (make := self._find(key)) is None:
            return None
        content = await asyncio.to_thread(make)
        return (prototype or default_buffer_prototype()).buffer.from_bytes(content[_slice(byte_range)])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Parts of several keys."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether there is something under ``key``."""
        return self._find(key) is not None

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        yield "zarr.json"
        for node, fqn in self._arrays.items():
            yield f"{node}/zarr.json"
            for place in product(*map(range, grid_shape(self._manifest.tensors[fqn]))):
                yield "/".join((node, "c", *map(str, place)))

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys that begin with ``prefix``."""
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names directly below ``prefix``."""
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        if not folder:
            names = ["zarr.json", *self._arrays]
        else:
            names = list(
                {key.removeprefix(folder).partition("/")[0]: None async for key in self.list_prefix(folder)}
            )
        for name in names:
            yield name

    async def set(self, key: str, value: Buffer) -> NoReturn:
        """Not possible."""
        raise ValueError("a checkpoint cannot be written through zarr")

    async def delete(self, key: str) -> NoReturn:
        """Not possible."""
        raise ValueError("a checkpoint cannot be written through zarr")


def node_name(fqn: str) -> str:
    """The name of a tensor's array: ``fqn``, with what zarr reserves written as in an address (``%2F``)."""
    name = quote(fqn, safe="".join(chr(c) for c in range(33, 127) if chr(c) not in "/%"))
    if name.startswith("__") or not name.strip(".") or name == "zarr.json":
        name = f"%{ord(name[0]):02X}{name[1:]}"
    return name


def chunk_shape(tensor: StoredTensor) -> tuple[int, ...]:
    """The grid that the stored boxes form, if they do and it is not too coarse; otherwise rows of some 16 MiB."""
    whole = tensor.global_shape
    if not prod(whole):
        return tuple(max(size, 1) for size in whole)
    boxes = [box for box in tensor.boxes if box.nbytes]
    chunk = next(box.shape for box in boxes if not any(box.offset))
    if boxes[0].nbytes <= LARGEST_CHUNK and all(_on_grid(box, chunk, whole) for box in boxes):
        return chunk
    row = tensor.nbytes // whole[0]
    return (min(max(EXTENT_BYTES // row, 1), whole[0]), *whole[1:])


def _on_grid(box: StoredBox, chunk: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    dims = zip(box.offset, box.shape, chunk, whole, strict=True)
    return all(start % size == 0 and n == min(size, total - start) for start, n, size, total in dims)


def grid_shape(tensor: StoredTensor) -> tuple[int, ...]:
    """Number of chunks in each dim."""
    return tuple(-(-n // size) for n, size in zip(tensor.global_shape, chunk_shape(tensor), strict=True))


def _place(key: str, grid: tuple[int, ...]) -> tuple[int, ...] | None:
    """The place of the chunk ``c/1/2`` in ``grid``."""
    first, *parts = key.split("/")
    if first != "c" or len(parts) != len(grid) or not all(p.isascii() and p.isdecimal() for p in parts):
        return None
    place = tuple(int(part) for part in parts)
    return place if all(i < n for i, n in zip(place, grid, strict=True)) else None


def _slice(byte_range: ByteRequest | None) -> slice:
    match byte_range:
        case None:
            return slice(None)
        case RangeByteRequest(start, end):
            return slice(start, end)
        case OffsetByteRequest(offset):
            return slice(offset, None)
        case SuffixByteRequest(suffix):
            return slice(-suffix, None) if suffix else slice(0)
    raise ValueError(f"not a range of bytes: {byte_range}")


def _group(manifest: Manifest) -> bytes:
    head = {"job": manifest.job, "step": manifest.step, "world_size": manifest.world_size}
    return group_document({"distrain": head})


def _array(fqn: str, tensor: StoredTensor) -> bytes:
    """The ``zarr.json`` of one tensor."""
    dtype = numpy_dtype(tensor.dtype)
    return canonical(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(tensor.global_shape),
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape(tensor))}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": [0.0, 0.0] if dtype.kind == "c" else False if dtype.kind == "b" else 0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "attributes": {"fqn": fqn, "dtype": tensor.dtype},
        }
    )
