"""The state of a training run, as boxes that any other layout can read.

Parameters and moments are saved by the parameters' names, whole or in the pieces that this rank owns: a slice of a flat
bucket becomes boxes of the parameters in it (``core.boxes``). Replicas hold equal boxes, and share the writing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distrain.core.boxes import runs_to_boxes
from distrain.core.protocols import ShardBox
from distrain.parallel.shards import Shard

if TYPE_CHECKING:
    from .loop import Trainer

MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainState:
    """What a ``Trainer`` goes on from: a ``ShardedState`` with a state dict for all that is no tensor."""

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self.optimizer = trainer.optimizer
        """whose step the lazy copy of these tensors must not overlap"""

    def shards(self) -> Iterator[tuple[ShardBox, Tensor]]:
        """Boxes of the parameters and of their moments, each with the memory that this rank updates."""
        for shard in self._trainer.assembly.data.shards:
            tensors = {"model": shard.param.detach()} | {key: self._moment(shard, key) for key in MOMENTS}
            for segment in shard.segments:
                for prefix, tensor in tensors.items():
                    run = tensor.view(-1)[segment.start : segment.stop]
                    box = replace(segment.box, fqn=f"{prefix}.{segment.name}")
                    for part, at in runs_to_boxes(box, first=segment.first, count=len(run)):
                        yield part, run[at : at + prod(part.shape)].view(part.shape)

    def state_dict(self) -> dict[str, Any]:
        """Steps done, and where the data stands; the same on every rank."""
        return {"step": self._trainer.step, "data": self._trainer.train_stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; the tensors have been written into ``shards`` already."""
        self._trainer.step = state["step"]
        self._trainer.train_stream.load_state_dict(state["data"])
        for shard in self._trainer.assembly.data.shards:
            step = self.optimizer.state[shard.param]["step"]
            if isinstance(step, Tensor):
                step.fill_(state["step"])
            else:
                self.optimizer.state[shard.param]["step"] = state["step"]
        self._trainer.assembly.data.updated()

    def _moment(self, shard: Shard, key: str) -> Tensor:
        """The optimizer's moment of a shard; made here if it has not stepped yet."""
        state = self.optimizer.state[shard.param]
        if not state:
            counts_in_tensor = isinstance(self.optimizer, torch.optim.AdamW)
            zero = torch.zeros((), dtype=torch.float32, device=shard.param.device)
            state |= {"step": zero if counts_in_tensor else 0}
            state |= {moment: torch.zeros_like(shard.param) for moment in MOMENTS}
        tensor: Tensor = state[key]
        return tensor
