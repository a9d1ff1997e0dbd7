"""One process against many: the same model, data and optimizer, whole and under a layout, in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distrain.core.config import OptimizerConfig
from distrain.core.vocabulary import DataParallel, Degrees, ModelShape, Schedule
from distrain.parallel import MicroBatch, Parallel, buckets, init
from distrain.parallel.shards import clip_, global_norm
from distrain.parallel.tensor import loss_context
from distrain.train.assembly import Assembly, assemble
from distrain.train.model import Decoder
from distrain.train.optim import build_optimizer
from distrain.train.weights import materialize

SHAPE = ModelShape(d_model=64, num_layers=8, num_heads=8, num_kv_heads=4, d_ffn=96, vocab_size=128)
ROWS = 2  # sequences of a micro-batch on one replica
STEPS = 3
SEED = 7
Arrays = dict[str, np.ndarray]
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A layout and what is trained under it; ``lengths`` has one entry a micro-batch."""

    degrees: Degrees
    schedule: Schedule = Schedule.ONE_F_ONE_B
    data: DataParallel = DataParallel.DDP
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-2, clip=0.5))
    lengths: tuple[int, ...] = (16, 16, 16, 16)
    shape: ModelShape = SHAPE
    smallest_bucket_bytes: int = 0
    """the default is so large that models of tests would have one bucket only"""

    def __str__(self) -> str:
        d = self.degrees
        buckets = "-one_bucket" if self.smallest_bucket_bytes else ""
        return f"tp{d.tp}-pp{d.pp}-dp{d.dp}-{self.schedule}-{self.data}-{self.optimizer.name}{buckets}"


@dataclass(frozen=True)
class Outcome:
    """Losses and gradient norms of each step, the first step's gradients, the last step's weights."""

    losses: list[float]
    norms: list[float]
    gradients: Arrays
    weights: Arrays


def batches(case: Case, step: int) -> Pairs:
    """Inputs and targets of each micro-batch over all replicas; some targets carry no loss."""
    generator = torch.Generator().manual_seed(100 + step)
    pairs = []
    for length in case.lengths:
        ids = torch.randint(
            0, case.shape.vocab_size, (ROWS * case.degrees.dp, length + 1), generator=generator
        )
        targets = ids[:, 1:].clone()
        targets[0, length // 2 :] = -100
        pairs.append((ids[:, :-1].contiguous(), targets))
    return pairs


def one_process(case: Case, *, pairs_of: Callable[[int], Pairs] | None = None) -> Outcome:
    """The plain way: the whole model, autograd, torch's own AdamW and clipping (or LAMB written out).

    ``pairs_of`` gives inputs and targets of a step, if not as ``batches`` does.
    """
    with torch.device("meta"):
        model = Decoder(case.shape).double()
    materialize(model, device=torch.device("cpu"), seed=SEED, num_layers=case.shape.num_layers)
    named = dict(model.named_parameters())
    optimizer = _reference_optimizer(named, case.optimizer)
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        pairs = pairs_of(step) if pairs_of else batches(case, step)
        num_tokens = count_tokens(pairs)
        total = torch.stack(
            [F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in pairs]
        ).sum()
        model.zero_grad()
        (total / num_tokens).backward()
        if step == 0:
            gradients = {
                name: param.grad.numpy().copy() for name, param in named.items() if param.grad is not None
            }
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), case.optimizer.clip or math.inf).item())
        losses.append(total.item() / num_tokens)
        optimizer.step()
    return Outcome(losses, norms, gradients, {name: param.detach().numpy() for name, param in named.items()})


def under_layout(rank: int, world_size: int, case: Case) -> Outcome:
    """The same on one rank of a job; the arrays are whole tensors of this rank's stages."""
    buckets.SMALLEST_BUCKET_BYTES = case.smallest_bucket_bytes
    parallel = init(case.degrees, device="cpu")
    assembly = assemble(
        case.shape,
        parallel,
        schedule=case.schedule,
        data=case.data,
        micro_batches=len(case.lengths),
        seed=SEED,
        dtype=torch.float64,
    )
    mine = slice(ROWS * parallel.coordinates["dp"], ROWS * (parallel.coordinates["dp"] + 1))

    def share(step: int) -> tuple[list[MicroBatch], int]:
        pairs = batches(case, step)
        tp, width = case.degrees.tp, case.shape.d_model
        return [
            MicroBatch(x[mine], y[mine], (ROWS, x.shape[1] // tp, width)) for x, y in pairs
        ], count_tokens(pairs)

    return train(case, parallel, assembly, share)


def train(
    case: Case, parallel: Parallel, assembly: Assembly, share: Callable[[int], tuple[list[MicroBatch], int]]
) -> Outcome:
    """Train on ``share(step)``: this rank's micro-batches, and the number of tokens on all ranks."""
    data = assembly.data
    optimizer = build_optimizer(
        data.shards, case.optimizer, names=assembly.names, group=parallel.groups.axis("model")
    )
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        micro_batches, assembly.loss.num_tokens = share(step)
        data.begin(len(micro_batches))
        with loss_context(case.degrees.tp):
            parts = assembly.runtime.step(micro_batches)
        data.reduce()
        if step == 0:
            gradients = _through_parameters(assembly, [shard.gradient for shard in data.shards])
        norm = global_norm(data.shards)
        if case.optimizer.clip:
            clip_(data.shards, norm, largest=case.optimizer.clip)
        optimizer.step()
        data.updated()
        loss = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
        dist.all_reduce(loss)
        losses.append(loss.item() / case.degrees.tp)
        norms.append(norm.item())
    data.gather()
    return Outcome(losses, norms, gradients, whole(assembly))


def count_tokens(pairs: Pairs) -> int:
    """Targets that carry loss."""
    return sum(int((targets != -100).sum()) for _, targets in pairs)


def whole(assembly: Assembly) -> Arrays:
    """Every parameter of this rank's stages as a whole array."""
    arrays = {}
    for module in assembly.modules.values():
        for name, param in module.named_parameters():
            full = param.full_tensor() if isinstance(param, DTensor) else param
            arrays[name] = full.detach().clone().numpy()
    return arrays


def _through_parameters(assembly: Assembly, values: list[Tensor]) -> Arrays:
    """``values``, one a shard, as whole arrays: written into the shards, spread like an update, read, undone."""
    data = assembly.data
    kept = [shard.param.detach().clone() for shard in data.shards]
    arrays = {}
    for source in (values, kept):
        with torch.no_grad():
            for shard, value in zip(data.shards, source, strict=True):
                shard.param.copy_(value)
        data.updated()
        data.gather()
        if source is values:
            arrays = whole(assembly)
    return arrays


def difference(ours: Arrays, theirs: Arrays) -> float:
    """Largest difference of any tensor over that tensor's largest magnitude."""
    return max(float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs)


def merge(parts: list[Arrays]) -> Arrays:
    """All stages' arrays; where several ranks hold a tensor they must agree to the bit."""
    merged: Arrays = {}
    for part in parts:
        for name, array in part.items():
            if name in merged:
                np.testing.assert_array_equal(array, merged[name], err_msg=name)
            merged[name] = array
    return merged


class _PlainLamb:
    """LAMB as the paper writes it, a parameter at a time."""

    def __init__(self, named: dict[str, nn.Parameter], config: OptimizerConfig) -> None:
        self.config, self.step_number = config, 0
        self.moments = [(param, torch.zeros_like(param), torch.zeros_like(param)) for param in named.values()]

    @torch.no_grad()
    def step(self) -> None:
        c = self.config
        self.step_number += 1
        for param, mean, square in self.moments:
            gradient = param.grad
            assert gradient is not None
            mean.copy_(c.beta1 * mean + (1 - c.beta1) * gradient)
            square.copy_(c.beta2 * square + (1 - c.beta2) * gradient**2)
            update = (mean / (1 - c.beta1**self.step_number)) / (
                (square / (1 - c.beta2**self.step_number)).sqrt() + c.eps
            )
            ratio = 1.0
            if param.dim() > 1:
                update = update + c.weight_decay * param
                ratio = param.norm() / update.norm()
            param.sub_(c.lr * ratio * update)


def _reference_optimizer(
    named: dict[str, nn.Parameter], config: OptimizerConfig
) -> torch.optim.AdamW | _PlainLamb:
    if config.name == "lamb":
        return _PlainLamb(named, config)
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
