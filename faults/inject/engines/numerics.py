"""Wrong numbers in a rank's gradients: a flipped bit, a NaN, a tensor of zeros.

They come to be after gradients have been summed over replicas and before the optimizer uses them, as an error of the
device's memory would: of several replicas only this one is wrong.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from distrain.core.vocabulary import FaultKind

from ..live import Here, Live
from ..points import Points
from .steps import Effect, place

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def install(faults: Sequence[Live], here: Here, points: Points, stack: ExitStack) -> None:
    """Put each fault where gradients are complete."""
    effects: dict[FaultKind, Effect] = {
        FaultKind.NUMERIC_BITFLIP: _flip,
        FaultKind.NUMERIC_NAN: _nan,
        FaultKind.NUMERIC_ZERO: _zero,
    }
    for live in faults:
        place(live, points, effects[live.fault.kind])


def flip_bit(tensor: Tensor, element: int, bit: int) -> None:
    """Flip bit ``bit`` (0 is the lowest of the significand) of one element, counted in C order, in place."""
    word = _WORDS[tensor.element_size()]
    top = 8 * tensor.element_size() - 1
    mask = -(1 << top) if bit == top else 1 << bit
    index = _index(tensor, element)
    flipped = tensor[index].clone().view(word) ^ torch.tensor(mask, dtype=word, device=tensor.device)
    tensor[index] = flipped.view(tensor.dtype)


@torch.no_grad()
def _flip(live: Live, context: Mapping[str, Any]) -> None:
    number, tensor, element = _choose(live, context["gradients"])
    num_bits = 8 * tensor.element_size()
    bit = live.param("bit") if live.param("bit") >= 0 else live.dice.randrange(num_bits)
    bit = min(bit, num_bits - 1)
    live.fired(step=context["step"], tensor=number, element=element, bit=bit)
    flip_bit(tensor, element, bit)


@torch.no_grad()
def _nan(live: Live, context: Mapping[str, Any]) -> None:
    number, tensor, element = _choose(live, context["gradients"])
    live.fired(step=context["step"], tensor=number, element=element)
    tensor[_index(tensor, element)] = torch.nan


@torch.no_grad()
def _zero(live: Live, context: Mapping[str, Any]) -> None:
    gradients = context["gradients"]
    number = live.param("tensor")
    live.fired(step=context["step"], tensor=number)
    for tensor in gradients if number < 0 else [gradients[number % len(gradients)]]:
        tensor.zero_()


def _choose(live: Live, gradients: Sequence[Tensor]) -> tuple[int, Tensor, int]:
    """Number of a tensor, the tensor, and the number of one of its elements, as given or by chance."""
    dice, number = live.dice, live.param("tensor")
    if number < 0:
        number = dice.choices(range(len(gradients)), weights=[each.numel() for each in gradients])[0]
    number %= len(gradients)
    tensor = gradients[number]
    element = live.param("element") if live.param("element") >= 0 else dice.randrange(tensor.numel())
    return number, tensor, element % tensor.numel()


def _index(tensor: Tensor, element: int) -> tuple[int, ...]:
    """Where the ``element``-th of a tensor is, whatever its strides."""
    index = []
    for size in reversed(tensor.shape):
        element, place = divmod(element, size)
        index.append(place)
    return tuple(reversed(index))
