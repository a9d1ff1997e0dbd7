"""DeepSpeed's checkpoint engines: torch, fast and decoupled, driven as its training engine drives them.

DeepSpeed is an optional extra. Its fast writer needs libaio, so the one that is written in Python stands in. A step
of its engine waits for the decoupled writer's commit before it updates anything: that is the fence. None of them syncs
what it has written; this is done for them.
"""

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .base import Training, sync_files


class _Engine:
    overlaps = False
    _engine: Any

    def __init__(self, training: Training, folder: Path) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.logger.setLevel(logging.ERROR)
        self._training, self._folder = training, folder

    def save(self, step: int) -> None:
        path = self._path(step)
        path.parent.mkdir()
        self._info = _commit_info(self._folder, step)
        self._engine.create(self._info)
        self._engine.save(self._training.tensors(), str(path))

    def fence(self) -> None:
        self._engine.commit(self._info)

    def durable(self) -> None:
        sync_files(self._folder / self._info.tag)

    def restore(self, step: int) -> None:
        loaded = self._engine.load(str(self._path(step)), map_location="cpu")
        for name, tensor in self._training.tensors().items():
            tensor.copy_(loaded[name])

    def close(self) -> None:
        pass

    def _path(self, step: int) -> Path:
        return self._folder / str(step) / "state.pt"


class Torch(_Engine):
    """The default: ``torch.save``."""

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        self._engine = TorchCheckpointEngine(_config())


class Fast(_Engine):
    """FastPersist's writer with buffers of its own."""

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        from deepspeed.runtime.checkpoint_engine.fast_checkpoint_engine import FastCheckpointEngine

        self._engine = FastCheckpointEngine(_config(), _writer(), False)


class Decoupled(_Engine):
    """The same in another process, next to forward and backward."""

    overlaps = True

    def __init__(self, training: Training, folder: Path) -> None:
        super().__init__(training, folder)
        import deepspeed
        from deepspeed.runtime.checkpoint_engine.decoupled_checkpoint_engine import DecoupledCheckpointEngine

        deepspeed.init_distributed("gloo")
        self._engine = DecoupledCheckpointEngine(_config(), _writer(), False)

    def close(self) -> None:
        self._engine.cleanup()


def _config() -> SimpleNamespace:
    from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config

    checkpoint = {"checkpoint": {"writer": {"type": "PYTHON", "decoupled": True}}}
    aio = {
        "block_size": 1 << 20,
        "queue_depth": 8,
        "single_submit": False,
        "overlap_events": True,
        "intra_op_parallelism": 1,
        "thread_count": 1,
    }
    return SimpleNamespace(checkpoint_config=get_checkpoint_config(checkpoint), aio_config=aio)


def _writer() -> Any:
    from deepspeed.runtime.model_checkpointing.data_parallel_writer_factory import DataParallelWriterConfig

    return DataParallelWriterConfig(world_size=1, rank=0, global_rank=0, local_rank=0, pure_dp=True)


def _commit_info(folder: Path, step: int) -> Any:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo

    return CheckpointCommitInfo(str(step), str(folder), False)
