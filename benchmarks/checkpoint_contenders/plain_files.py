"""torch.save and safetensors, each followed by fsync: training stands still until all is on disk."""

from pathlib import Path

import torch
from torch import Tensor

from .base import Training, sync_files


class _File:
    overlaps = False

    def __init__(self, training: Training, folder: Path) -> None:
        self._training, self._folder = training, folder

    def save(self, step: int) -> None:
        path = self._path(step)
        path.parent.mkdir()
        self._write(path, self._training.tensors())
        sync_files(path.parent)

    def fence(self) -> None:
        pass

    def durable(self) -> None:
        pass

    def restore(self, step: int) -> None:
        loaded = self._read(self._path(step))
        for name, tensor in self._training.tensors().items():
            tensor.copy_(loaded[name])

    def close(self) -> None:
        pass

    def _path(self, step: int) -> Path:
        return self._folder / str(step) / "state"

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def _read(self, path: Path) -> dict[str, Tensor]:
        raise NotImplementedError


class TorchSave(_File):
    """``torch.save`` and ``torch.load``, mapped."""

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        torch.save(tensors, path)

    def _read(self, path: Path) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = torch.load(path, mmap=True, weights_only=True)
        return loaded


class Safetensors(_File):
    """``save_file`` and ``load_file``."""

    def _write(self, path: Path, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        save_file(tensors, path)

    def _read(self, path: Path) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(path)
