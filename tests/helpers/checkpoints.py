"""Writes real checkpoints, from numpy arrays or torch tensors cut into boxes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrain.checkpoint.commit import begin, commit
from distrain.checkpoint.layout import pack
from distrain.checkpoint.safe_state import encode
from distrain.checkpoint.stream import BlobStream
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.core.protocols import ShardBox

Shard = tuple[ShardBox, NDArray[Any]]


def whole(name: str, dtype: str, array: NDArray[Any]) -> Shard:
    """All of a tensor."""
    zeros = (0,) * array.ndim
    box = ShardBox(fqn=name, dtype=dtype, global_shape=array.shape, offset=zeros, shape=array.shape)
    return box, array


def write_checkpoint(
    root: Path,
    shards_by_rank: Sequence[Sequence[Shard]],
    *,
    step: int = 1,
    attempt: str = "a0",
    objects: Mapping[str, Any] | None = None,
) -> Path:
    """A committed checkpoint below ``root``: what each rank writes, and plain values that all of them have."""
    storage = PosixStorage(root)
    folder = begin(storage, step, attempt)
    encoded = {name: encode(value, name=name) for name, value in (objects or {}).items()}
    for rank, shards in enumerate(shards_by_rank):
        layout = pack(rank, [box for box, _ in shards])
        with BlobStream(storage, folder, layout) as blob:
            for piece, (_, array) in zip(layout.pieces, shards, strict=True):
                blob.put(piece, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            blob.finish(
                job="test", step=step, attempt=attempt, world_size=len(shards_by_rank), objects=encoded
            )
    return root / commit(storage, step, attempt, mesh={"tp": 1})
