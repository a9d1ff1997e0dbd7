"""What all contenders share: the job, the optimizer, and how a rank is driven and judged.

A contender trains the model of ``distrain.train`` from the same initial weights on the same batches with torch's fused
AdamW. What differs is who spreads the work over the ranks.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.core.config import OptimizerConfig
from distrain.core.vocabulary import ModelShape
from distrain.train.model import Decoder
from distrain.train.weights import materialize

CPU = torch.device("cpu")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is trained. Without clipping, since not every peer can clip over pipeline stages."""

    shape: ModelShape
    seq_len: int = 128
    global_batch: int = 16
    """sequences of one optimizer step, over all ranks"""
    micro_batches: int = 1
    seed: int = 7
    # eps keeps Adam from blowing up the rounding of gradients that are almost zero, which would hide real differences
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, eps=1e-6, clip=0.0)  # noqa: RUF009

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch * self.seq_len

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the whole batch: int64 [global_batch, seq_len] each."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + step)
        ids = torch.randint(self.shape.vocab_size, (self.global_batch, self.seq_len + 1), generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


class Contender(Protocol):
    """One rank of one way to train."""

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """One optimizer step on the whole batch, of which this rank takes its part.

        Returns this rank's share of the mean loss of the batch: the shares of all ranks add up to it.
        """

    def finish(self) -> None:
        """Wait for whatever the last step has left running."""

    def weights(self) -> dict[str, Tensor]:
        """Whole parameters by their names in the model, at least those that no other rank has."""


class Worker:
    """Drives a contender; the methods are what a crew is asked for."""

    def __init__(self, contender: Contender, job: Job) -> None:
        self._contender = contender
        self._job = job
        self._next = 0

    def train(self, num_steps: int) -> tuple[float, float, float, list[float]]:
        """Start and end on the machine's clock, CPU time used (all in seconds), and the shares of each step's loss."""
        batches = [self._job.batch(self._next + i) for i in range(num_steps)]
        dist.barrier()
        start, used = time.perf_counter(), time.process_time()
        shares = [self._contender.step(inputs, targets) for inputs, targets in batches]
        self._contender.finish()
        end, used = time.perf_counter(), time.process_time() - used
        self._next += num_steps
        return start, end, used, [0.0 if share is None else share.item() for share in shares]

    def weights(self) -> Arrays:
        """Whole parameters by name."""
        return {name: tensor.detach().clone().numpy() for name, tensor in self._contender.weights().items()}


def build_model(job: Job, *, first_layer: int = 0, last_layer: int | None = None) -> Decoder:
    """A range of layers with the job's initial weights."""
    with torch.device("meta"):
        model = Decoder(job.shape, first_layer=first_layer, last_layer=last_layer)
    materialize(model, device=CPU, seed=job.seed, num_layers=job.shape.num_layers)
    return model


def adamw(params: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer of all peers; the one that ``distrain.train.optim`` builds for ours."""
    return torch.optim.AdamW(decay_groups(params, config), **adamw_options(config))  # type: ignore[arg-type]


def decay_groups(params: Iterable[nn.Parameter], config: OptimizerConfig) -> list[dict[str, object]]:
    """Matrices with weight decay, norms without."""
    listed = list(params)
    return [
        {
            "params": [p for p in listed if (p.dim() > 1) is decay],
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
        if any((p.dim() > 1) is decay for p in listed)
    ]


def adamw_options(config: OptimizerConfig) -> dict[str, object]:
    """The other arguments of AdamW."""
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


Factory = Callable[[int, int, Job], Contender]
"""rank, world size, job"""


def make_worker(rank: int, world_size: int, factory: Factory, job: Job) -> Worker:
    """What each process of a crew runs."""
    return Worker(factory(rank, world_size, job), job)


class Reference:
    """The plain way on one rank: the whole model, autograd, torch's AdamW. All others are held against it."""

    def __init__(self, rank: int, world_size: int, job: Job) -> None:
        self._model = build_model(job)
        self._optimizer = adamw(self._model.parameters(), job.optimizer)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self._optimizer.zero_grad()
        loss = self.loss(inputs, targets)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of the whole batch, with its graph."""
        return mean_loss(self._model(inputs), targets)

    def finish(self) -> None:
        pass

    def weights(self) -> dict[str, Tensor]:
        return dict(self._model.named_parameters())
