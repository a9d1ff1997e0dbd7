"""The training loop, short enough to read in one sitting.

Every rank runs the same ``Trainer``. It draws the same global batches, computes its own share of each, and reports the
same numbers; only what hooks do with them differs between ranks.
"""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distrain.core.config import RunConfig
from distrain.core.failpoints import hit
from distrain.parallel import MicroBatch, Parallel
from distrain.parallel.shards import clip_, squared_norms
from distrain.parallel.tensor import loss_context
from distrain.planners.parallel_plan import ParallelPlan

from .activations import manage
from .assembly import assemble
from .data.batches import BatchStream, GlobalBatch, total_tokens
from .data.corpus import Corpus, Split, open_corpus
from .data.prefetch import Prefetcher
from .hooks import Hook, SequenceReport, StepReport
from .optim import build_optimizer, learning_rate
from .precision import DTYPES, products
from .pretrained import pretrained
from .sequences.plans import AHEAD
from .sequences.settings import SequenceSettings
from .sequences.shares import Share, build_shares


class Trainer:
    """A model, its data and its optimizer on one rank of a job."""

    def __init__(
        self,
        config: RunConfig,
        plan: ParallelPlan,
        parallel: Parallel,
        *,
        hooks: Sequence[Hook] = (),
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """``should_stop`` is asked in each step; training ends after the step in which any rank says so."""
        self.config, self.plan, self.parallel, self.hooks = config, plan, parallel, hooks
        self.shape = config.model.shape()
        self.step = 0
        self._computing_ms: float | None = None  # of the last step
        self.is_stopped = False
        """whether somebody has asked to end before the last step"""
        self._should_stop = should_stop
        self._peak_flops = parallel.device.spec().peak_flops * plan.world_size
        dtype, device = DTYPES[config.train.dtype], parallel.device.torch_device
        self._zero = torch.zeros((), dtype=dtype, device=device)
        parallel.device.seed(config.seed)
        random.seed(config.seed)  # for data and hooks of users
        np.random.seed(config.seed % 2**32)
        corpus = open_corpus(config.data, vocab_size=self.shape.vocab_size)
        self.train_stream = self._stream(corpus, "train")
        self.validation_stream = self._stream(corpus, "held_out")
        self.assembly = assemble(
            self.shape,
            parallel,
            schedule=plan.schedule,
            data=plan.data,
            micro_batches=plan.micro_batches,
            seed=config.seed,
            dtype=dtype,
            given=pretrained(config.model).parameter if config.model.weights else None,
        )
        self.sequences = SequenceSettings.of(config, plan)
        self.shares = build_shares(config, plan, parallel, sequences=self.sequences)
        self.activations = manage(config, plan, parallel, self.assembly.layers, sequences=self.sequences)
        if self.activations is not None:
            self.assembly.runtime.add_hook(self.activations.manager)
        self.optimizer = build_optimizer(
            self.assembly.data.shards,
            config.optimizer,
            names=self.assembly.names,
            group=parallel.groups.axis("model"),
        )

    def run(self) -> None:
        """Train up to ``train.steps`` or a request to stop, validating as often as asked and at the end."""
        self._tell("on_start")
        every = self.config.train.eval_every or self.config.train.steps
        self._expect()
        with Prefetcher(self.train_stream, self._prepare) as batches, closing(self.shares):
            while not self.is_done:
                start = time.perf_counter()
                batch, share = batches.next()
                self._expect()
                loss, norm = self.train_step(self.shares.ready(share), num_tokens=total_tokens(batch))
                self._tell("on_step", self._report(batch, share, loss, norm, time.perf_counter() - start))
                if self.step % every == 0 or self.step == self.config.train.steps:
                    self._tell("on_validation", step=self.step, loss=self.validate())
        self._tell("on_end")

    @property
    def is_done(self) -> bool:
        """Whether there is no step to come."""
        return self.is_stopped or self.step >= self.config.train.steps

    def train_step(self, share: Sequence[MicroBatch], *, num_tokens: int) -> tuple[float, float]:
        """One optimizer step on this rank's micro-batches; mean loss and gradient norm of the whole batch."""
        hit("train.step", step=self.step + 1)
        start, end = (self.parallel.device.event(timing=True) for _ in range(2))
        start.record()
        data, optimizer = self.assembly.data, self.config.optimizer
        data.begin(len(share))
        rate = learning_rate(self.step, optimizer, num_steps=self.config.train.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        manager = self.activations.manager if self.activations is not None else nullcontext()
        with manager, self._precision(), loss_context(self.plan.degrees.tp):
            self.assembly.loss.num_tokens = num_tokens
            losses = self.assembly.runtime.step(share)
        data.reduce()
        gradients, copies = [s.gradient for s in data.shards], [s.copies for s in data.shards]
        hit("train.gradients", step=self.step + 1, gradients=gradients)
        loss, square, stops = self._sum_over_ranks(
            losses, squared_norms(gradients, copies), self._zero + self._should_stop()
        )
        end.record()
        norm = square.sqrt()
        if optimizer.clip:
            clip_(data.shards, norm, largest=optimizer.clip)
        self.optimizer.step()
        data.updated()
        self.step += 1
        self.is_stopped = bool(stops)
        self._computing_ms = start.elapsed_time(end)
        return loss.item(), norm.item()

    def validate(self) -> float:
        """Mean loss over the held-out sequences, in nats a token; the same sequences each time."""
        total, num_tokens = 0.0, 0
        for ahead in range(self._validation_batches):
            batch = self.validation_stream.peek(ahead)
            share = self.shares.prepare("held_out", self.validation_stream, batch)
            with self._precision(), loss_context(self.plan.degrees.tp):
                self.assembly.loss.num_tokens = 1
                losses = self.assembly.runtime.evaluate(self.shares.ready(share))
            (loss,) = self._sum_over_ranks(losses)
            total, num_tokens = total + loss.item(), num_tokens + total_tokens(batch)
        return total / num_tokens

    def describe(self) -> list[str]:
        """The layout in a few lines."""
        plan, degrees, shape, data = self.plan, self.plan.degrees, self.shape, self.config.data
        mode, managed = self.config.activations.mode, self.activations
        settings = self.sequences
        micro_batches = "planned" if settings and settings.is_planned else str(plan.micro_batches)
        return [
            f"model    {self.config.model.preset}: {shape.num_params / 1e6:,.2f} M parameters,"
            f" {shape.num_layers} layers, d {shape.d_model}, {shape.num_heads} heads,"
            f" {shape.num_kv_heads} KV heads, vocabulary {shape.vocab_size}",
            f"layout   {plan.world_size} ranks = tp {degrees.tp} x pp {degrees.pp} x dp {degrees.dp} ({plan.data}),"
            f" {plan.schedule}, {degrees.num_stages} stages, {micro_batches} micro-batches",
            *([f"sequence {settings.describe()}"] if settings else []),
            *([f"memory   {mode}: {managed.describe()}"] if managed is not None else []),
            f"data     {data.source}: {self.train_stream.num_sequences:,} sequences of up to {data.seq_len} tokens,"
            f" {data.global_batch} a step",
        ]

    def _stream(self, corpus: Corpus, part: Split) -> BatchStream:
        data = self.config.data
        return BatchStream(
            corpus,
            packing=data.packing,
            seq_len=data.seq_len,
            global_batch=data.global_batch,
            seed=self.config.seed,
            split=part,
        )

    @property
    def _validation_batches(self) -> int:
        return -(-self.config.train.eval_sequences // self.config.data.global_batch)

    def _expect(self) -> None:
        """Let plans be made of what comes: some steps ahead, and of validation, which is always the same."""
        self.shares.expect("train", self.train_stream, num_batches=AHEAD)
        if self._computing_ms is None:
            self.shares.expect("held_out", self.validation_stream, num_batches=self._validation_batches)

    def _prepare(self, batch: GlobalBatch) -> Share:
        """This rank's share of a training batch, in the thread that reads ahead."""
        share = self.shares.prepare("train", self.train_stream, batch)
        inputs = [m.inputs for m in share.micro_batches if m.inputs is not None]
        hit("train.data", step=batch.step + 1, inputs=inputs)
        return share

    def _precision(self) -> torch.autocast:
        return products(self.config.train.dtype, self.parallel.device.torch_device)

    def _sum_over_ranks(self, losses: Sequence[Tensor], *numbers: Tensor) -> tuple[Tensor, ...]:
        """Loss of the batch, from wherever last stages are, and sums of other numbers, in one collective."""
        shares = torch.stack(list(losses)).sum() if losses else self._zero
        totals = torch.stack([shares / self.plan.degrees.tp, *numbers])
        dist.all_reduce(totals)
        return totals.unbind()

    def _report(
        self, batch: GlobalBatch, share: Share, loss: float, norm: float, seconds: float
    ) -> StepReport:
        num_tokens = total_tokens(batch)
        lengths, counts = np.unique(batch.lengths, return_counts=True)
        flops = sum(
            length * count * self.shape.flops_per_token(length)
            for length, count in zip(lengths.tolist(), counts.tolist(), strict=True)
        )
        return StepReport(
            step=self.step,
            loss=loss,
            grad_norm=norm,
            lr=self.optimizer.param_groups[0]["lr"],
            num_tokens=num_tokens,
            seconds=seconds,
            tokens_per_s=num_tokens / seconds,
            mfu=flops / seconds / self._peak_flops,
            peak_memory_bytes=self.parallel.device.peak_memory_bytes(),
            sequences=self._sequence_report(share),
            activations=self.activations.report() if self.activations is not None else None,
        )

    def _sequence_report(self, share: Share) -> SequenceReport | None:
        planned = share.planned
        if planned is None or self._computing_ms is None:
            return None
        return SequenceReport(
            groups=planned.groups(),
            predicted_ms=planned.predicted_ms(pp=self.plan.degrees.pp),
            measured_ms=self._computing_ms,
            gap=planned.plan.gap,
            note=planned.note,
        )

    def _tell(self, method: str, *args: object, **kwargs: object) -> None:
        for hook in self.hooks:
            getattr(hook, method)(self, *args, **kwargs)
