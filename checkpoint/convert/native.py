"""Distrain's own checkpoints as source and sink of conversions."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from distrain.core.errors import ConfigError
from distrain.core.protocols import ShardBox

from ..commit import begin, commit, discard, working_folder
from ..layout import pack
from ..locate import locate
from ..names import step_folder
from ..reshard import blobs, execute, plan
from ..stream import BlobStream
from ..tiers.posix import PosixStorage
from ..torch_memory import array_of, bytes_of, dtype_of
from ..untrusted import Json
from .form import Source, TensorInfo, batches

_ATTEMPT = "convert"


class NativeSource:
    """A committed checkpoint; the newest below a root."""

    def __init__(self, path: Path) -> None:
        self._found = locate(path)
        manifest = self._found.manifest

        def place(name: str) -> tuple[int, int]:
            return min(
                ((box.writer, box.byte_offset) for box in manifest.tensors[name].boxes), default=(0, 0)
            )

        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(manifest.tensors[name].dtype, manifest.tensors[name].global_shape)
            for name in sorted(manifest.tensors, key=place)
        }
        # What differs from rank to rank (random states) has no meaning for other formats and other numbers of ranks.
        self.objects: Mapping[str, Json] = {
            name: stored[0].value for name, stored in manifest.objects.items() if len(stored) == 1
        }
        self.left_out = tuple(name for name in manifest.objects if name not in self.objects)
        self.step = manifest.step

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """In the order of the files; an extent is read once for each batch that has something of it."""
        stored = self._found.manifest.tensors
        open_writer = blobs(self._found.storage, self._found.folder, self._found.manifest)
        for names in batches(self.tensors):
            out = [torch.empty(self.tensors[n].shape, dtype=dtype_of(self.tensors[n].dtype)) for n in names]
            boxes = [whole(name, self.tensors[name]) for name in names]
            execute(plan(boxes, stored), open_writer, [array_of(tensor) for tensor in out])
            while names:
                yield names.pop(0), out.pop(0)


def write_native(source: Source, root: Path) -> Path:
    """Commit ``source`` below ``root`` as a checkpoint of one writer; returns its folder.

    Raises:
        ConfigError: there is a checkpoint of this step already.
    """
    storage, step, final = PosixStorage(root), source.step, root / step_folder(source.step)
    if final.exists():
        raise ConfigError("the target exists", got=str(final), allowed="a root without this step")
    discard(storage, working_folder(storage, step, _ATTEMPT))  # of an attempt that was killed
    folder = begin(storage, step, _ATTEMPT)
    layout = pack(0, [whole(name, info) for name, info in source.tensors.items()])
    try:
        with BlobStream(storage, folder, layout) as blob:
            for piece, (_, tensor) in zip(layout.pieces, source.read(), strict=True):
                blob.put(piece, bytes_of(tensor))
            blob.finish(job="convert", step=step, attempt=_ATTEMPT, world_size=1, objects=source.objects)
        return root / commit(storage, step, _ATTEMPT, mesh={})
    except BaseException:
        discard(storage, folder)
        raise


def whole(name: str, info: TensorInfo) -> ShardBox:
    """The box that is all of a tensor."""
    zeros = (0,) * len(info.shape)
    return ShardBox(fqn=name, dtype=info.dtype, global_shape=info.shape, offset=zeros, shape=info.shape)
