"""One pipeline stage on one rank: runs its module a micro-batch at a time and remembers what backward needs.

The stage knows nothing of schedules or communication. Forward keeps the graph of each micro-batch under its number;
backward consumes it, either whole (B), or split into the gradient of the input (I), which the stage before is
waiting for, and those of the weights (W), which can fill a bubble later (zero bubble; Qi et al. 2024, section 2).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from distrain.parallel.deferred import Splitter, Tape, second_half

LossFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(slots=True)
class _Saved:
    source: Tensor
    """what the module was given; leaf of the graph"""
    result: Tensor
    """what it returned, or the loss"""
    tape: Tape | None = None
    """what W needs, if the backward is split by our own means"""
    param_groups: list[dict[str, Any]] | None = None
    """after I: what W needs"""


class Stage:
    """A module that is stage ``index`` of ``num_stages``; the last one also takes the loss."""

    def __init__(self, module: nn.Module, *, index: int, num_stages: int, loss_fn: LossFn) -> None:
        self.module = module
        self.index = index
        self.is_first = index == 0
        self.is_last = index == num_stages - 1
        self._loss_fn = loss_fn
        self._saved: dict[int, _Saved] = {}
        self._splitter = Splitter(module)
        self.can_defer = not self.is_first and bool(self._splitter)
        """whether B leaves the weights' gradients to a later W; nobody waits for the first stage's B"""

    def forward(
        self, micro_batch: int, source: Tensor, *, targets: Tensor | None, packed: object | None = None
    ) -> Tensor:
        """Run the module; the result is detached: a hidden state to send on, or the loss (scalar) on the last stage.

        ``source`` is the ids [B, T] on the first stage and the received hidden state elsewhere; ``packed`` goes to
        the module as it is.
        """
        context = {} if packed is None else {"packed": packed}
        needs_grad = torch.is_grad_enabled()
        if needs_grad and not self.is_first:
            source = source.detach().requires_grad_()
        with self._splitter.recording() if needs_grad and self.can_defer else nullcontext() as tape:
            result: Tensor = self.module(source, **context)
        if self.is_last:
            assert targets is not None
            result = self._loss_fn(result, targets)
        if needs_grad:
            self._saved[micro_batch] = _Saved(source, result, tape)
        return result.detach()

    def backward(self, micro_batch: int, gradient: Tensor | None) -> Tensor | None:
        """B: accumulate the weights' gradients and return the input's (None on the first stage).

        Where the stage ``can_defer``, the gradients of linear weights are left to ``backward_weight``.
        """
        if self.can_defer:
            return self.backward_input(micro_batch, gradient)
        saved = self._saved.pop(micro_batch)
        torch.autograd.backward(saved.result, gradient)
        return None if self.is_first else saved.source.grad

    def backward_input(self, micro_batch: int, gradient: Tensor | None) -> Tensor | None:
        """I: return the input's gradient and keep what W needs.

        The first stage has no input to wait for: its W does everything, so ``gradient`` is only kept.
        """
        saved = self._saved[micro_batch]
        if saved.tape is not None:
            return self._splitter.first_half(saved.tape, saved.result, gradient, saved.source)
        if self.is_first:
            self._saved[micro_batch] = _Saved(saved.source, saved.result, None, [{"gradient": gradient}])
            return None
        gradients = None if gradient is None else [gradient]
        _, saved.param_groups = stage_backward_input(
            [saved.result], gradients, [saved.source], self.module.parameters()
        )
        return saved.source.grad

    def backward_weight(self, micro_batch: int) -> None:
        """W: accumulate the weights' gradients of a micro-batch whose I is done."""
        saved = self._saved.pop(micro_batch)
        if saved.tape is not None:
            return second_half(saved.tape)
        assert saved.param_groups is not None
        if self.is_first:
            torch.autograd.backward(saved.result, saved.param_groups[0]["gradient"])
        else:
            stage_backward_weight(self.module.parameters(), saved.param_groups)
        return None

    def forget(self) -> None:
        """Drop the graphs of a step that was broken off."""
        self._saved.clear()
