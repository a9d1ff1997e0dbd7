"""Distrain: the calls of a training loop. Reading from disk goes the way of a job whose keeper is gone too."""

from functools import partial
from pathlib import Path

from distrain.checkpoint.boxes import collect
from distrain.checkpoint.checkpointer import Checkpointer
from distrain.checkpoint.restore import disk_sources, fill
from distrain.checkpoint.tiers.posix import PosixStorage

from .base import Training


class Ours:
    """Snapshots to the keeper's memory, which one tier on the local disk makes durable."""

    overlaps = True

    def __init__(self, training: Training, folder: Path, *, lazy: bool) -> None:
        self._tracked = {"model": training.model, "optimizer": training.optimizer}
        self._storage = PosixStorage(folder)
        self._checkpoints = Checkpointer(folder, lazy=lazy, keep_last=2, strict=True)
        self._checkpoints.track(**self._tracked)
        self._checkpoints.restore()  # as every loop begins; nothing is there yet
        self._step = 0

    def save(self, step: int) -> None:
        self._step = step
        self._checkpoints.step(step)

    def fence(self) -> None:
        self._checkpoints.fence()

    def durable(self) -> None:
        if not self._checkpoints.wait(self._step).reached:
            raise RuntimeError(f"step {self._step} never became durable")

    def restore(self, step: int) -> None:
        source = next(source for source in disk_sources(self._storage) if source.step == step)
        fill(source, collect(self._tracked).items, strict=True)

    def recall(self, step: int) -> None:
        """Restore from the keeper's memory."""
        if self._checkpoints.restore() != step:
            raise RuntimeError("another step came back from memory")

    def helpers(self) -> list[int]:
        """The process that works for us."""
        client = self._checkpoints._connected()
        return [int(client.status()["pid"])]

    def close(self) -> None:
        self._checkpoints.close()


eager = partial(Ours, lazy=False)
lazy = partial(Ours, lazy=True)
