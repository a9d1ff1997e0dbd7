"""Carries out a pipeline schedule: a loop over this rank's steps, with receives posted ahead.

The same loop serves one stage without neighbours (plain gradient accumulation) and interleaved or V-shaped stages,
because everything that differs is in the schedule. A message between two stages of the same rank (the bottom of the
V) is handed over without being sent.

A B whose stage can put its weights' gradients off sends the input's gradient first. Rank r then owes up to r of the
others, as in ZB-H1 (Qi et al. 2024, section 2.3): gradients set out earlier on the last ranks, on which the first ones
wait, and what is owed fills the time when no more arrive. Rank r has r activations less in flight than the first rank,
so what it owes costs no memory beyond that rank's.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.core.protocols import MicrobatchHooks
from distrain.parallel.groups import GroupRegistry
from distrain.planners.schedules import Op, PipelineSchedule, Step, build

from .p2p import Kind, Links, Message
from .stage import Stage


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What a rank knows of one micro-batch; shapes are those on this rank."""

    inputs: Tensor | None
    """ids [B, T] where the first stage is"""
    targets: Tensor | None
    """ids [B, T] where the last stage is"""
    hidden_shape: tuple[int, ...]
    """of the tensor between stages: [B, T / tp, D]"""
    packed: object | None = None
    """what every stage's module is told of the tokens (``train.model.Packed``), if they are a packed row"""


class PipelineRuntime:
    """Runs the stages of one rank through a schedule, step after step.

    ``ranks`` are the global ranks of the pipeline, first to last; ``rank`` is the place of this one among them.
    A step may have another number of micro-batches than ``schedule``, the same on all of these ranks.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: PipelineSchedule,
        *,
        ranks: Sequence[int],
        rank: int,
        groups: GroupRegistry,
        device: torch.device,
        hidden_dtype: torch.dtype,
        hooks: Sequence[MicrobatchHooks] = (),
    ) -> None:
        self._stages = {stage.index: stage for stage in stages}
        self._schedule = schedule
        self._schedules = {schedule.micro_batches: schedule}
        self._ranks = ranks
        self._rank = rank
        self._groups = groups
        self._device = device
        self._dtype = hidden_dtype
        self._hooks = hooks
        self._last_stage = len(schedule.stage_to_rank) - 1

    def add_hook(self, hook: MicrobatchHooks) -> None:
        """Wrap each piece of the steps to come in one more hook, inside the others."""
        self._hooks = (*self._hooks, hook)

    def step(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Forward and backward of every micro-batch; the losses, where the last stage is, else an empty list."""
        return self._run(self._steps(len(micro_batches)), micro_batches)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Forward only; the losses, where the last stage is, else an empty list."""
        forwards = [step for step in self._steps(len(micro_batches)) if step.op is Op.FORWARD]
        return self._run(forwards, micro_batches)

    def _steps(self, micro_batches: int) -> Sequence[Step]:
        """This rank's row of the schedule for so many micro-batches."""
        if micro_batches not in self._schedules:
            like = self._schedule
            self._schedules[micro_batches] = build(
                like.kind,
                num_ranks=like.num_ranks,
                micro_batches=micro_batches,
                stages_per_rank=like.stages_per_rank,
            )
        return self._schedules[micro_batches].steps[self._rank]

    def _run(self, steps: Sequence[Step], micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        incoming = [m for step in steps if (m := self._source(step, micro_batches)) and m.src != m.dst]
        links = Links(incoming, groups=self._groups, num_stages=self._last_stage + 1, device=self._device)
        local: dict[tuple[Kind, int, int], Tensor] = {}
        losses: dict[int, Tensor] = {}
        owed: deque[tuple[Step, bool]] = deque()
        last_backward = {
            step.stage: i for i, step in enumerate(steps) if step.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT)
        }
        try:
            for position, step in enumerate(steps):
                arrived = self._take(self._source(step, micro_batches), links, local)
                defers = step.op is Op.BACKWARD and self._stages[step.stage].can_defer
                last = last_backward.get(step.stage) == position
                with self._around(step, last=last and not defers):
                    result = self._compute(step, arrived, micro_batches[step.micro_batch])
                if step.op is Op.FORWARD and step.stage == self._last_stage:
                    assert result is not None
                    losses[step.micro_batch] = result
                elif result is not None:
                    self._pass_on(step, result, links, local, micro_batches)
                if defers:
                    owed.append((Step(Op.BACKWARD_WEIGHT, step.stage, step.micro_batch), last))
                    if len(owed) > self._rank:
                        self._make_up(*owed.popleft())
            while owed:
                self._make_up(*owed.popleft())
            links.finish()
        finally:
            for stage in self._stages.values():
                stage.forget()
        return [losses[i] for i in sorted(losses)]

    def _make_up(self, step: Step, last: bool) -> None:
        """The W that a B has left for later."""
        with self._around(step, last=last):
            self._stages[step.stage].backward_weight(step.micro_batch)

    @contextmanager
    def _around(self, step: Step, *, last: bool) -> Iterator[None]:
        """All hooks around one step."""
        with ExitStack() as around:
            for hook in self._hooks:
                around.enter_context(hook.around(step.op, step.stage, step.micro_batch, last=last))
            yield

    def _source(self, step: Step, micro_batches: Sequence[MicroBatch]) -> Message | None:
        """The message that ``step`` waits for, if any."""
        match step.op:
            case Op.FORWARD if step.stage > 0:
                return self._message(
                    Kind.ACTIVATION, step.stage - 1, step.stage, step.micro_batch, micro_batches
                )
            case Op.BACKWARD | Op.BACKWARD_INPUT if step.stage < self._last_stage:
                return self._message(
                    Kind.GRADIENT, step.stage + 1, step.stage, step.micro_batch, micro_batches
                )
        return None

    def _message(
        self, kind: Kind, source: int, target: int, micro_batch: int, micro_batches: Sequence[MicroBatch]
    ) -> Message:
        owner = self._schedule.stage_to_rank
        return Message(
            kind=kind,
            stage=target,
            micro_batch=micro_batch,
            src=self._ranks[owner[source]],
            dst=self._ranks[owner[target]],
            shape=micro_batches[micro_batch].hidden_shape,
            dtype=self._dtype,
        )

    def _take(
        self, message: Message | None, links: Links, local: dict[tuple[Kind, int, int], Tensor]
    ) -> Tensor | None:
        if message is None:
            return None
        key = (message.kind, message.stage, message.micro_batch)
        if message.src == message.dst:
            return local.pop(key)
        return links.receive(message.kind, stage=message.stage, micro_batch=message.micro_batch)

    def _compute(self, step: Step, arrived: Tensor | None, micro_batch: MicroBatch) -> Tensor | None:
        """Run the step; the result is what the neighbouring stage waits for, or the loss."""
        stage = self._stages[step.stage]
        match step.op:
            case Op.FORWARD:
                source = micro_batch.inputs if stage.is_first else arrived
                assert source is not None
                return stage.forward(
                    step.micro_batch, source, targets=micro_batch.targets, packed=micro_batch.packed
                )
            case Op.BACKWARD:
                return stage.backward(step.micro_batch, arrived)
            case Op.BACKWARD_INPUT:
                return stage.backward_input(step.micro_batch, arrived)
            case Op.BACKWARD_WEIGHT:
                stage.backward_weight(step.micro_batch)
                return None

    def _pass_on(
        self,
        step: Step,
        result: Tensor,
        links: Links,
        local: dict[tuple[Kind, int, int], Tensor],
        micro_batches: Sequence[MicroBatch],
    ) -> None:
        forward = step.op is Op.FORWARD
        kind, target = (Kind.ACTIVATION, step.stage + 1) if forward else (Kind.GRADIENT, step.stage - 1)
        message = self._message(kind, step.stage, target, step.micro_batch, micro_batches)
        if message.src == message.dst:
            local[kind, target, step.micro_batch] = result
        else:
            links.send(message, result)
