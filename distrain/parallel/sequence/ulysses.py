"""Ulysses: from some tokens of all heads to all tokens of some heads, and back (Jacobs et al. 2023).

Queries, keys and values change places in one all-to-all, outputs in another; each rank sends L h / d numbers, however
many ranks there are. Shapes: T tokens of a rank, n ranks, H query and K key/value heads of E features.

Heads need not divide. Rank i takes query heads H i / n to H (i + 1) / n, and the key/value heads that these read; a
head read on two ranks goes to both, and its gradient is their sum::

    H = 6, K = 2, n = 4     queries 0 | 1 2 | 3 | 4 5      keys 0 | 0 | 1 | 1
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distrain.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """Which heads [start, stop) each of the ranks takes."""

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    of_query: tuple[tuple[int, ...], ...]
    """for each rank, the key/value head of each of its query heads, counted from the rank's first"""

    @classmethod
    def of(cls, *, num_heads: int, num_kv_heads: int, num_ranks: int) -> "HeadSplit":
        """ConfigError if a rank would have no head, or if the key/value heads do not divide the others."""
        if num_heads < num_ranks:
            raise ConfigError(
                "more ranks than heads to share by Ulysses",
                got=f"ulysses = {num_ranks}, {num_heads} heads on each rank of tensor parallelism",
                allowed=f"ulysses <= {num_heads}",
                hint=f"let a ring serve the rest: ulysses = {num_heads}, or fewer, and ring above 1",
            )
        if num_heads % num_kv_heads:
            raise ConfigError(
                "key/value heads do not divide the query heads",
                got=f"{num_heads} query heads, {num_kv_heads} key/value heads",
                allowed=", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0),
                hint="change model.num_kv_heads",
            )
        bounds = [num_heads * rank // num_ranks for rank in range(num_ranks + 1)]
        queries = tuple(pairwise(bounds))
        readers = num_heads // num_kv_heads
        keys = tuple((start // readers, (stop - 1) // readers + 1) for start, stop in queries)
        of_query = tuple(
            tuple(head // readers - first for head in range(start, stop))
            for (start, stop), (first, _) in zip(queries, keys, strict=True)
        )
        return cls(queries, keys, of_query)

    def sizes(self, rank: int) -> list[int]:
        """Heads of q, k and v that ``rank`` takes."""
        (start, stop), (first, last) = self.queries[rank], self.keys[rank]
        return [stop - start, last - first, last - first]

    def repeats(self, rank: int) -> tuple[int, ...] | None:
        """A key/value head for each query head of ``rank``, if its heads are not read by equally many in turn."""
        num_queries, num_keys, _ = self.sizes(rank)
        heads = self.of_query[rank]
        is_even = num_queries % num_keys == 0 and all(
            head == query // (num_queries // num_keys) for query, head in enumerate(heads)
        )
        return None if is_even else heads


def scatter_heads(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, *, split: HeadSplit, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, heads, E] of own tokens -> [own heads, n T, E] of all tokens, in the order of the ranks. Differentiable."""
    return _ScatterHeads.apply(q_THE, k_TKE, v_TKE, split, group)  # type: ignore[no-any-return, no-untyped-call]


def gather_heads(out_HNE: Tensor, *, split: HeadSplit, group: dist.ProcessGroup) -> Tensor:
    """[own heads, n T, E] -> [T, H, E]: the way back, for outputs. Differentiable."""
    return _GatherHeads.apply(out_HNE, split, group)  # type: ignore[no-any-return, no-untyped-call]


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, split: HeadSplit, group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        ctx.split, ctx.group, ctx.num_kv_heads = split, group, k_TKE.shape[1]
        parts = [
            tensor[:, slice(*heads)].transpose(0, 1)
            for queries, keys in zip(split.queries, split.keys, strict=True)
            for tensor, heads in ((q_THE, queries), (k_TKE, keys), (v_TKE, keys))
        ]
        own = split.sizes(dist.get_rank(group))
        q_HNE, k_HNE, v_HNE = _to_own_heads(torch.cat(parts), split, group).split(own)
        return q_HNE, k_HNE, v_HNE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_HNE: Tensor) -> tuple[Tensor | None, ...]:
        split, group = ctx.split, ctx.group
        num_ranks = len(split.queries)
        sizes = [size for rank in range(num_ranks) for size in split.sizes(rank)]
        parts = _to_own_tokens(torch.cat(grads_HNE), split, group).split(sizes)
        _, num_tokens, num_features = parts[0].shape
        dq_HTE = torch.cat(parts[::3])
        dk_KTE, dv_KTE = dq_HTE.new_zeros((2, ctx.num_kv_heads, num_tokens, num_features))
        for heads, dk, dv in zip(split.keys, parts[1::3], parts[2::3], strict=True):
            dk_KTE[slice(*heads)] += dk
            dv_KTE[slice(*heads)] += dv
        return dq_HTE.transpose(0, 1), dk_KTE.transpose(0, 1), dv_KTE.transpose(0, 1), None, None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_HNE: Tensor, split: HeadSplit, group: dist.ProcessGroup) -> Tensor:
        ctx.split, ctx.group = split, group
        return _to_own_tokens(out_HNE, split, group, of_queries=True).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor | None, ...]:
        return _to_own_heads(grad_THE.transpose(0, 1), ctx.split, ctx.group, of_queries=True), None, None


def _num_heads(split: HeadSplit, *, of_queries: bool) -> list[int]:
    """Heads that each rank takes: of the queries alone, or of queries, keys and values."""
    return [
        split.sizes(rank)[0] if of_queries else sum(split.sizes(rank)) for rank in range(len(split.queries))
    ]


def _to_own_heads(
    heads_STE: Tensor, split: HeadSplit, group: dist.ProcessGroup, *, of_queries: bool = False
) -> Tensor:
    """[heads of all ranks one after the other, T, E] -> [own heads, n T, E]."""
    counts = _num_heads(split, of_queries=of_queries)
    own = counts[dist.get_rank(group)]
    arrived = heads_STE.new_empty((len(counts) * own, *heads_STE.shape[1:]))
    dist.all_to_all_single(arrived, heads_STE.contiguous(), [own] * len(counts), counts, group=group)
    by_rank: Tensor = arrived.unflatten(0, (len(counts), own))
    return by_rank.transpose(0, 1).flatten(1, 2)


def _to_own_tokens(
    heads_HNE: Tensor, split: HeadSplit, group: dist.ProcessGroup, *, of_queries: bool = False
) -> Tensor:
    """[own heads, n T, E] -> [heads of all ranks one after the other, T, E]."""
    counts = _num_heads(split, of_queries=of_queries)
    own = counts[dist.get_rank(group)]
    by_rank: Tensor = heads_HNE.unflatten(1, (len(counts), -1))
    leaving = by_rank.transpose(0, 1).flatten(0, 1)
    arrived = leaving.new_empty((sum(counts), *leaving.shape[1:]))
    dist.all_to_all_single(arrived, leaving.contiguous(), counts, [own] * len(counts), group=group)
    return arrived
