"""Training steps on fake tensors, as buffers: up to 20,000 of them, traced on any machine.

Models are one rank's layers (``distrain.activation.rank_layers``) and a head that takes the loss in chunks. The
pipeline is the first rank of 1F1B over micro-batches of different lengths, so that long lives of many sizes interleave.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distrain.activation import trace_module
from distrain.activation.rank_layers import Kind, rank_layer
from distrain.core.vocabulary import PRESETS, Schedule
from distrain.planners.buffers import Buffer
from distrain.planners.schedules import Op, build


class _Model(nn.Module):
    """Layers of one rank, and a head that takes the loss in chunks."""

    def __init__(self, name: str, kind: Kind, *, layers: int, tp: int, recompute: bool) -> None:
        super().__init__()
        shape = PRESETS[name]
        self.recompute = recompute
        self.layers = nn.ModuleList(rank_layer(shape, kind=kind, tp=tp, cp=1) for _ in range(layers))
        with torch.device("meta"):
            self.head = nn.Linear(shape.d_model, shape.vocab_size // tp, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = (
                checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
                if self.recompute
                else layer(x)
            )
        return torch.stack([self._loss(part) for part in x.split(4096, dim=1)]).mean()

    def _loss(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self.head(x).float(), dim=-1).mean()


def _traced(
    name: str, kind: Kind, *, layers: int, tp: int, tokens: int, recompute: bool
) -> tuple[Buffer, ...]:
    model = _Model(name, kind, layers=layers, tp=tp, recompute=recompute)
    hidden = torch.empty(1, tokens // tp, PRESETS[name].d_model, dtype=torch.bfloat16, device="meta")
    return trace_module(model, hidden, loss=lambda value: value).buffers()


def steps(*, quick: bool) -> Iterator[tuple[str, Callable[[], tuple[Buffer, ...]]]]:
    """Name and maker of each trace."""
    if quick:
        yield "7b gpt, 4 layers", lambda: _traced("7b", "gpt", layers=4, tp=8, tokens=65536, recompute=False)
        return
    for recompute in (False, True):
        how = ", recompute" if recompute else ""
        yield (
            f"7b gpt, 32 layers, 128K{how}",
            partial(_traced, "7b", "gpt", layers=32, tp=8, tokens=131072, recompute=recompute),
        )
        yield (
            f"65b llama, 80 layers, 64K{how}",
            partial(_traced, "65b", "llama", layers=80, tp=8, tokens=65536, recompute=recompute),
        )
    yield "13b llama, 1f1b, lengths differ", lambda: _pipeline(ranks=4, micro_batches=30, layers=10)


def _pipeline(*, ranks: int, micro_batches: int, layers: int) -> tuple[Buffer, ...]:
    """The first rank of a 1F1B pipeline over micro-batches of different lengths: their lifetimes interleave.

    Each micro-batch is traced alone; its forward and its backward then take their places in the schedule.
    """
    drawn = random.Random(0)
    schedule = build(Schedule.ONE_F_ONE_B, num_ranks=ranks, micro_batches=micro_batches)
    model = _Model("13b", "llama", layers=layers, tp=8, recompute=False)
    traces = []
    for _ in range(micro_batches):
        tokens = 4096 * drawn.randint(2, 16)
        hidden = torch.empty(1, tokens // 8, PRESETS["13b"].d_model, dtype=torch.bfloat16, device="meta")
        traces.append(trace_module(model, hidden, loss=lambda value: value))
    starts: dict[tuple[bool, int], int] = {}
    now = 0
    for step in schedule.steps[0]:
        found = traces[step.micro_batch]
        backward = step.op is Op.BACKWARD
        starts[backward, step.micro_batch] = now
        now += found.end - found.forward_end + 1 if backward else found.forward_end + 1
    buffers = []
    for index, found in enumerate(traces):

        def moved(tick: int, index: int = index, split: int = found.forward_end) -> int:
            return starts[True, index] + tick - split if tick > split + 1 else starts[False, index] + tick

        for each in found.buffers():
            buffers.append(
                replace(each, id=f"{index}.{each.id}", lower=moved(each.lower), upper=moved(each.upper))
            )
    return tuple(buffers)
