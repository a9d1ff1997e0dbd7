"""The backward of a stage in two halves: what the stage before waits for, then the gradients of the weights.

The products that make the gradients of linear weights are a good quarter of a step's work, and nobody waits for them
(zero bubble; Qi et al. 2024, section 2). While a tape is recording, each ``Linear`` notes its input and the edge of the
graph at which the gradient of its output will arrive. Autograd is then asked for the gradients at these edges, and of
everything else but the noted weights, so that it skips their products; they are made later, each one added in place::

    forward       y = x @ weight^T                            noted: weight, x, edge of y
    first half    autograd: gradient of the input and at each edge
    second half   weight.grad += y.grad^T @ x

The noted inputs stay in memory until then; the outputs do not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.distributed.tensor import DTensor


@dataclass(slots=True)
class Tape:
    """The linear layers of one forward pass."""

    weights: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    edges: list[GradientEdge] = field(default_factory=list)
    gradients: Sequence[Tensor] = ()
    """at the edges, once the first half has run"""


@dataclass(slots=True)
class _Recorder:
    """Where the linear layers of a module find the tape to write to, if one is recording."""

    tape: Tape | None = None


class Linear(nn.Linear):
    """``nn.Linear`` without bias, whose weight's gradient can be made later."""

    recorder: _Recorder | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        output = F.linear(input, self.weight)
        if self.recorder is not None and (tape := self.recorder.tape) is not None:
            assert output.grad_fn is not None
            tape.weights.append(self.weight)
            tape.inputs.append(input)
            tape.edges.append(GradientEdge(output.grad_fn, output.output_nr))
        return output


class Splitter:
    """Splits the backward passes of ``module``, of those of its linear layers at least that are not sharded."""

    def __init__(self, module: nn.Module) -> None:
        self._linears = [
            each
            for each in module.modules()
            if isinstance(each, Linear) and each.weight.requires_grad and not isinstance(each.weight, DTensor)
        ]
        self._recorder = _Recorder()
        for linear in self._linears:
            linear.recorder = self._recorder
        noted = {linear.weight for linear in self._linears}
        self._others = [param for param in module.parameters() if param.requires_grad and param not in noted]

    def __bool__(self) -> bool:
        """Whether there is anything to put off."""
        return bool(self._linears)

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """A tape of the forward pass inside."""
        self._recorder.tape = Tape()
        try:
            yield self._recorder.tape
        finally:
            self._recorder.tape = None

    def first_half(
        self, tape: Tape, result: Tensor, gradient: Tensor | None, source: Tensor | None
    ) -> Tensor | None:
        """Gradients of everything but the noted weights; returns that of ``source``, others are accumulated."""
        sources = [] if source is None else [source]
        wanted = [*sources, *self._others, *tape.edges]
        found = torch.autograd.grad([result], wanted, [gradient])  # type: ignore[arg-type]
        for param, value in zip(self._others, found[len(sources) :], strict=False):
            _accumulate(param, value)
        tape.gradients = found[len(wanted) - len(tape.edges) :]
        return found[0] if sources else None


@torch.no_grad()
def second_half(tape: Tape) -> None:
    """Gradients of the noted weights."""
    for weight, x, gradient in zip(tape.weights, tape.inputs, tape.gradients, strict=True):
        left, right = gradient.flatten(0, -2).t(), x.flatten(0, -2)
        if weight.grad is not None and weight.dtype == left.dtype == right.dtype:
            weight.grad.addmm_(left, right)
        else:
            _accumulate(weight, (left @ right.to(left.dtype)).to(weight.dtype))


def _accumulate(param: Tensor, value: Tensor) -> None:
    if param.grad is None:
        param.grad = value
    else:
        param.grad.add_(value)
