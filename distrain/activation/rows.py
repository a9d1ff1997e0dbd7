"""Which elements of a tensor belong to which tokens, and how to take and put those of a range of tokens.

Tokens need not be a dim of their own. A matrix product sees [B * T, D]; after the tokens of p ranks were gathered,
rows p * n lie in p blocks of n. All of these are one case: a dim of size outer * n * inner::

    [B, n, D]        dim 1, outer 1, inner 1
    [B * n, D]       dim 0, outer B, inner 1
    [B, p * n, D]    dim 1, outer p, inner 1      every rank's tail, next to each other, is the tail
    [B * n * H, E]   dim 0, outer B, inner H
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .storage import Window


class Rows(NamedTuple):
    """The place of the tokens in a tensor: ``shape[dim] == outer * num_tokens * inner``."""

    dim: int
    outer: int
    inner: int
    num_tokens: int

    def view(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` of ``tensor`` as a view with two more dims."""
        split: Tensor = tensor.unflatten(self.dim, (self.outer, self.num_tokens, self.inner))
        return split.narrow(self.dim + 1, start, stop - start)

    def shape_of(self, shape: tuple[int, ...], length: int) -> tuple[int, ...]:
        """``shape`` with ``length`` tokens."""
        return (*shape[: self.dim], self.outer * length * self.inner, *shape[self.dim + 1 :])

    def take(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """A dense copy of tokens ``start`` to ``stop``, its dims in the same order in memory."""
        window = Window.of(tensor)
        part = dense(self.shape_of(window.shape, stop - start), window.order, tensor)
        self.put(part, tensor, start=start, stop=stop)
        return part

    def put(self, part: Tensor, tensor: Tensor, *, start: int, stop: int) -> None:
        """Copy tokens ``start`` to ``stop`` of ``tensor`` to ``part``, which holds these only."""
        part.unflatten(self.dim, (self.outer, stop - start, self.inner)).copy_(self.view(tensor, start, stop))

    def fill(self, tensor: Tensor, part: Tensor, *, start: int, stop: int) -> None:
        """Copy ``part``, which holds tokens ``start`` to ``stop`` only, to its place in ``tensor``."""
        length = part.shape[self.dim] // (self.outer * self.inner)
        rows = part.unflatten(self.dim, (self.outer, length, self.inner))
        self.view(tensor, start, stop).copy_(rows.narrow(self.dim + 1, length - (stop - start), stop - start))


def dense(shape: tuple[int, ...], order: list[int], like: Tensor) -> Tensor:
    """An uninitialised tensor without gaps whose dims lie in memory in ``order``."""
    blank = torch.empty([shape[dim] for dim in order], dtype=like.dtype, device=like.device)
    return blank.permute([order.index(dim) for dim in range(len(shape))])


def possible(shape: tuple[int, ...], num_tokens: int) -> Iterator[Rows]:
    """Where tokens might be in a tensor of ``shape``: the plain case first."""
    sizes = sorted(
        (size // num_tokens, dim) for dim, size in enumerate(shape) if size and size % num_tokens == 0
    )
    for factor, dim in sizes:
        for outer in _divisors(factor):
            yield Rows(dim, outer, factor // outer, num_tokens)


def _divisors(number: int) -> list[int]:
    """Largest first."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)
