"""The content of a manifest, and what must hold of it as a whole.

Every tensor is tiled by boxes, every box is a run of bytes of one writer, and every byte belongs to one box at most.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from .divide import overlapping
from .layout import DTYPES, check_bytes
from .untrusted import Json, refuse


@dataclass(frozen=True, slots=True)
class StoredBox:
    """One box of a tensor: row-major bytes from ``byte_offset`` of a writer's logical bytes."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    writer: int
    byte_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A whole tensor; its boxes tile it."""

    dtype: str
    global_shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.global_shape) * DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class StoredObject:
    """State that is no tensor, as these writers have it."""

    writers: tuple[int, ...]
    value: Json


@dataclass(frozen=True, slots=True)
class StoredWriter:
    """One blob."""

    writer: int
    nbytes: int
    crcs: tuple[int, ...]
    """of each extent"""
    index_crc: int
    record_digest: str


@dataclass(frozen=True)
class Manifest:
    """Everything about one checkpoint but its bytes."""

    job: str
    step: int
    attempt: str
    created: float
    """seconds since 1970"""
    world_size: int
    mesh: Mapping[str, Json]
    """how the job that saved was laid out; for people and for hooks"""
    writers: tuple[StoredWriter, ...]
    """by rank"""
    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, tuple[StoredObject, ...]]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def object(self, name: str, *, rank: int = 0) -> Json:
        """What ``rank`` saved under ``name``; what the first writer saved if that rank saved nothing.

        Raises:
            KeyError: nobody saved anything under this name.
        """
        stored = self.objects[name]
        return next((entry.value for entry in stored if rank in entry.writers), stored[0].value)


def check_manifest(manifest: Manifest) -> None:
    """Refuse, by DamageError, what no single value shows: writers, tiling, bytes claimed twice."""
    if len(manifest.writers) != manifest.world_size:
        refuse("the number of writers", len(manifest.writers), f"{manifest.world_size}, as the world size")
    runs: list[list[tuple[int, int, str]]] = [[] for _ in manifest.writers]
    for fqn, tensor in manifest.tensors.items():
        for stored in tensor.boxes:
            if stored.writer >= len(runs):
                refuse(f"{fqn}: writer", stored.writer, f"less than {len(runs)}")
            runs[stored.writer].append((stored.byte_offset, stored.nbytes, fqn))
        _check_tiling(fqn, tensor)
    for writer, claimed in zip(manifest.writers, runs, strict=True):
        check_bytes(claimed, nbytes=writer.nbytes)
    for name, stored_objects in manifest.objects.items():
        if any(w >= len(runs) for entry in stored_objects for w in entry.writers):
            refuse(f"{name}: writers", "one that is none", f"less than {len(runs)}")


def _check_tiling(fqn: str, tensor: StoredTensor) -> None:
    """Disjoint boxes whose sizes add up to the whole tile it."""
    if pair := overlapping(tensor.boxes):
        shown = [f"offset {box.offset}, shape {box.shape}" for box in pair]
        refuse(f"{fqn}: boxes that overlap", " and ".join(shown), "boxes that tile the tensor")
    held, whole = sum(prod(box.shape) for box in tensor.boxes), prod(tensor.global_shape)
    if held != whole:
        refuse(f"{fqn}: elements in its boxes", held, f"{whole}, as the global shape {tensor.global_shape}")
