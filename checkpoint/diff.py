"""What differs between two checkpoints, tensor by tensor, however each is divided.

Extents with equal layouts and equal checksums are equal and are not read, so that comparing a checkpoint with a copy
costs two manifests.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import EXTENT_BYTES
from .manifest import Manifest, StoredTensor
from .tensors import TensorReader
from .untrusted import Json, canonical

ELEMENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that the two checkpoints do not have alike."""

    name: str
    what: str
    """``only in the first``, ``only in the second``, ``dtype``, ``shape``, ``values``, ``object``"""
    detail: str = ""
    num_elements: int = 0
    """elements that differ"""
    max_abs: float | None = None
    """largest difference of two finite values, where values can be subtracted"""


def diff(
    first: TensorReader,
    second: TensorReader,
    *,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> Iterator[Difference]:
    """All differences, tensors first. ``progress`` is called with the bytes of each tensor that is done.

    Raises:
        DataError: bytes that have to be compared are damaged.
    """
    ours, theirs = first.manifest.tensors, second.manifest.tensors
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs or name not in ours:
            yield Difference(name, "only in the first" if name in ours else "only in the second")
        elif ours[name].dtype != theirs[name].dtype:
            yield Difference(name, "dtype", f"{ours[name].dtype} and {theirs[name].dtype}")
        elif ours[name].global_shape != theirs[name].global_shape:
            yield Difference(name, "shape", f"{ours[name].global_shape} and {theirs[name].global_shape}")
        elif not _same_extents(name, first.manifest, second.manifest):
            yield from _values(name, first, second)
        if name in ours:
            progress(ours[name].nbytes)
    yield from _objects(first.manifest, second.manifest)


def _same_extents(name: str, first: Manifest, second: Manifest) -> bool:
    """Whether checksums alone show that a tensor is the same: equal boxes in equal extents."""
    ours, theirs = first.tensors[name], second.tensors[name]
    if ours.boxes != theirs.boxes:
        return False
    for box in ours.boxes:
        extents = slice(box.byte_offset // EXTENT_BYTES, -(-(box.byte_offset + box.nbytes) // EXTENT_BYTES))
        if first.writers[box.writer].crcs[extents] != second.writers[box.writer].crcs[extents]:
            return False
    return True


def _values(name: str, first: TensorReader, second: TensorReader) -> Iterator[Difference]:
    stored = first.manifest.tensors[name]
    differing, largest = 0, None
    for offset, shape in _rows(stored):
        a, b = (reader.read(name, offset=offset, shape=shape) for reader in (first, second))
        unequal = _bits(a) != _bits(b)
        if count := int(unequal.sum()):
            differing += count
            gap = _largest_gap(a.ravel()[unequal], b.ravel()[unequal], stored.dtype)
            largest = gap if largest is None or gap is None else max(largest, gap)
    if differing:
        share = f"{differing} of {prod(stored.global_shape)} elements"
        yield Difference(name, "values", share, differing, largest)


def _rows(stored: StoredTensor) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The whole tensor as slabs of rows that fit into memory."""
    whole = stored.global_shape
    if not whole:
        yield (), ()
        return
    step = max(ELEMENTS_AT_ONCE // max(prod(whole[1:]), 1), 1)
    for start in range(0, whole[0], step):
        yield (start, *(0,) * (len(whole) - 1)), (min(step, whole[0] - start), *whole[1:])


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    """Elements as opaque bytes: NaN equals itself, and 0.0 is not -0.0."""
    return values.reshape(-1).view(f"V{values.itemsize}")


def _largest_gap(a: NDArray[Any], b: NDArray[Any], dtype: str) -> float | None:
    """Largest difference of two finite values; None for types that numpy cannot subtract."""
    if dtype == "complex32" or dtype.startswith("float8"):
        return None
    if dtype == "bfloat16":  # the upper half of a float32
        a, b = ((values.astype(np.uint32) << 16).view(np.float32) for values in (a, b))
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(a.astype(wide) - b.astype(wide))
    return float(np.max(gaps, where=np.isfinite(gaps), initial=0.0))


def _objects(first: Manifest, second: Manifest) -> Iterator[Difference]:
    for name in sorted(first.objects.keys() | second.objects.keys()):
        if name not in first.objects or name not in second.objects:
            yield Difference(name, "only in the first" if name in first.objects else "only in the second")
        elif _spelt(first, name) != _spelt(second, name):
            yield Difference(name, "object")


def _spelt(manifest: Manifest, name: str) -> bytes:
    values: Json = [[list(entry.writers), entry.value] for entry in manifest.objects[name]]
    return canonical(values)
