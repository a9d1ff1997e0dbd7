"""Whole tensors, or regions of them, out of a checkpoint, whatever boxes they are stored in.

For looking at a checkpoint: a reader keeps the last few extents, because many small tensors share one. Loading a
job's state goes through ``reshard`` directly.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from math import prod
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from distrain.core.protocols import ShardBox

from .blob import BlobReader
from .layout import DTYPES, STRIDE
from .manifest import Manifest
from .reshard import execute, plan
from .storage import Storage, aligned_memory

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
CACHED_EXTENTS = 8


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's type for torch's name; unsigned integers of the same size where numpy has none (bfloat16, float8)."""
    try:
        return np.dtype(dtype).newbyteorder("<")
    except TypeError:
        return np.dtype(_BITS[DTYPES[dtype]]).newbyteorder("<")


class TensorReader:
    """Reads regions of the tensors of one checkpoint, verified; one at a time, from any thread."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest) -> None:
        self._storage, self._folder, self.manifest = storage, folder, manifest
        self._cache: OrderedDict[tuple[int, int], memoryview] = OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, fqn: str, *, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> NDArray[Any]:
        """The region of ``fqn`` at ``offset`` of ``shape``; the whole tensor unless given.

        Raises:
            KeyError: there is no such tensor.
            DataError: an extent is damaged or cannot be read.
        """
        stored = self.manifest.tensors[fqn]
        start = (0,) * len(stored.global_shape) if offset is None else tuple(offset)
        box = ShardBox(
            fqn=fqn,
            dtype=stored.dtype,
            global_shape=stored.global_shape,
            offset=start,
            shape=stored.global_shape if shape is None else tuple(shape),
        )
        out = np.empty(box.shape, numpy_dtype(stored.dtype))
        with self._lock:
            if prod(box.shape):
                execute(plan([box], {fqn: stored}), self._writer, [out], num_threads=1)
        return out

    def _writer(self, writer: int) -> "_Cached":
        crcs = self.manifest.writers[writer].crcs
        return _Cached(BlobReader(self._storage, self._folder, writer=writer, crcs=crcs), writer, self._cache)


class _Cached:
    """A blob of which the extents that were read last are kept; all blobs of a reader share the memory."""

    def __init__(
        self, blob: BlobReader, writer: int, cache: OrderedDict[tuple[int, int], memoryview]
    ) -> None:
        self._blob, self._writer, self._cache = blob, writer, cache

    def read(self, extent: int, buffer: memoryview) -> memoryview:
        """The extent; the memory is good until the next call."""
        place = self._writer, extent
        if place in self._cache:
            self._cache.move_to_end(place)
            return self._cache[place]
        full = len(self._cache) >= CACHED_EXTENTS
        memory = self._cache.popitem(last=False)[1] if full else aligned_memory(STRIDE)
        self._blob.read(extent, memory)
        self._cache[place] = memory
        return memory

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blob.__exit__(kind, error, trace)
