"""What passes between formats: whole named tensors, one after the other, and plain values.

Every format is a *source* that yields its tensors in whatever order suits its medium, and a *sink* that takes them in
that order. So each format is written once, any two of them combine, and memory holds one batch of tensors at a time,
however large the checkpoint is.

Two sets of names mean the same to formats that know models. In a loop that tracks ``model`` and ``optimizer``, tensors
are called ``model.<parameter>`` and ``optimizer.state.<parameter>.<key>``; ``distrain train`` says
``train.model.<parameter>`` and ``train.<key>.<parameter>``. What comes from those formats gets the former.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

from torch import Tensor

from ..layout import DTYPES
from ..untrusted import Json

MODEL, OPTIMIZER = "model", "optimizer"
BATCH_BYTES = 256 << 20
"""tensors are read in batches of about this size, so that what they share is read once"""

TRAIN = "train"
_WEIGHT = re.compile(rf"(?:{TRAIN}\.)?{MODEL}\.(?P<parameter>.+)")
_STATES = (
    re.compile(rf"{OPTIMIZER}\.state\.(?P<parameter>.+)\.(?P<key>[^.]+)"),
    re.compile(rf"{TRAIN}\.(?P<key>exp_avg|exp_avg_sq)\.(?P<parameter>.+)"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A whole tensor without its data."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return prod(self.shape) * DTYPES[self.dtype]


class Source(Protocol):
    """A checkpoint that can be read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Everything that ``read`` yields, in its order."""

    @property
    def objects(self) -> Mapping[str, Json]:
        """Values that are no tensors, as ``safe_state`` encodes them."""

    @property
    def left_out(self) -> tuple[str, ...]:
        """What the checkpoint holds beyond that."""

    @property
    def step(self) -> int:
        """Of training; 0 if it does not say."""

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor, contiguous and on the CPU; it is not referred to any more when the next is asked for.

        Raises:
            DataError: something is damaged.
        """


@dataclass(frozen=True, slots=True)
class Renamed:
    """Some tensors of a source under other names."""

    source: Source
    names: Mapping[str, str]
    """old name -> new name; what is not in it is left out"""
    keep_objects: bool = True

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """In the order of the source."""
        return {self.names[name]: info for name, info in self.source.tensors.items() if name in self.names}

    @property
    def objects(self) -> Mapping[str, Json]:
        """Those of the source."""
        return self.source.objects if self.keep_objects else {}

    @property
    def left_out(self) -> tuple[str, ...]:
        """With the source's own."""
        objects = () if self.keep_objects else tuple(self.source.objects)
        mine = tuple(name for name in self.source.tensors if name not in self.names)
        return (*self.source.left_out, *mine, *objects)

    @property
    def step(self) -> int:
        """That of the source."""
        return self.source.step

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Reads all, and passes on what has a name."""
        for name, tensor in self.source.read():
            if name in self.names:
                yield self.names[name], tensor


def batches(tensors: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """The names in their order, in groups of about BATCH_BYTES and at least one tensor."""
    batch: list[str] = []
    size = 0
    for name, info in tensors.items():
        if batch and size + info.nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += info.nbytes
    if batch:
        yield batch


def parameter(name: str) -> str | None:
    """What the model itself calls the tensor ``name``, if it is one of the model's."""
    match = _WEIGHT.fullmatch(name)
    return match["parameter"] if match else None


def optimizer_state(name: str) -> tuple[str, str] | None:
    """Parameter and key if ``name`` is a tensor of the optimizer."""
    match = next(filter(None, (pattern.fullmatch(name) for pattern in _STATES)), None)
    return (match["parameter"], match["key"]) if match else None
