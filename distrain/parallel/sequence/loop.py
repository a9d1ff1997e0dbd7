"""Attention piece by piece with an operator for one rectangle: on the CPU, and where no packed kernel serves.

A key/value head and its query heads are one batch entry, with the head's keys repeated by stride and not in memory.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .varlen import Piece, Saved, merge

BAND = 128
"""queries of a band: the more, the more of a band's keys are hidden from some; the fewer, the more bands"""


class Rectangle(Protocol):
    """Attention of queries [K, G, N, E] against keys and values [K, G, M, E]; ``mask`` [N, M] is added to scores.

    ``is_causal``: query i sees keys up to i.
    """

    is_linear: bool
    """whether its memory grows with N + M; where it grows with N x M, queries are given to it in bands"""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output [K, G, N, E] and LSE [K, G, N]."""

    def backward(
        self, saved: Saved, k: Tensor, v: Tensor, *, is_causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, the latter two by query head."""


class FlashCpu:
    """torch's flash attention for CPUs: float64 to bfloat16."""

    is_linear = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``Rectangle``."""
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return operator(q, k, v, 0.0, is_causal, attn_mask=mask)  # type: ignore[no-any-return]

    def backward(
        self, saved: Saved, k: Tensor, v: Tensor, *, is_causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Rectangle``."""
        grad, q, out, lse = saved
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return operator(grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask)  # type: ignore[no-any-return]


class Plain:
    """Matrix products, for types that no flash kernel of the device takes."""

    is_linear = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See ``Rectangle``."""
        scores = _scores(q, k, is_causal=is_causal, mask=mask)
        lse = scores.logsumexp(-1)
        return (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ v, lse

    def backward(
        self, saved: Saved, k: Tensor, v: Tensor, *, is_causal: bool, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Rectangle``."""
        grad, q, out, lse = saved
        p = (_scores(q, k, is_causal=is_causal, mask=mask) - lse.unsqueeze(-1)).exp()
        delta = (grad * out).sum(-1, keepdim=True)
        ds = (p * (grad @ v.transpose(-1, -2) - delta)).to(q.dtype) / math.sqrt(q.shape[-1])
        return ds @ k, ds.transpose(-1, -2) @ q, p.to(grad.dtype).transpose(-1, -2) @ grad


def _scores(q: Tensor, k: Tensor, *, is_causal: bool, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if scores.dtype.itemsize < 4:
        scores = scores.float()
    if is_causal:
        shown = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~shown, -torch.inf)
    return scores if mask is None else scores + mask


class LoopKernel:
    """The ``Kernel`` that computes one rectangle after the other."""

    def __init__(self, steps: Sequence[Sequence[Piece]], *, window: int, rectangle: Rectangle) -> None:
        self._steps, self._window, self._rectangle = steps, window, rectangle

    def _bands(self, piece: Piece, like: Tensor) -> Iterator[tuple[slice, slice, Tensor | None]]:
        return bands(piece, self._window, cut=not self._rectangle.is_linear, like=like)

    def forward(
        self, step: int, q_KGNE: Tensor, kv_2KME: Sequence[Tensor], out_KGNE: Tensor, lse_KGN: Tensor
    ) -> None:
        """See ``Kernel``."""
        for piece in self._steps[step]:
            for queries, keys, mask in self._bands(piece, q_KGNE):
                q, (k, v) = q_KGNE[:, :, queries], _repeated(kv_2KME, keys, q_KGNE.shape[1])
                is_causal = piece.distance == 0 and mask is None
                out, lse = self._rectangle.forward(q, k, v, is_causal=is_causal, mask=mask)
                target, target_lse = out_KGNE[:, :, queries], lse_KGN[:, :, queries]
                if piece.distance == 0:
                    target.copy_(out)
                    target_lse.copy_(lse)
                else:
                    merge(target, target_lse, out, lse)

    def backward(
        self, step: int, saved: Saved, kv_2KME: Sequence[Tensor], dq_KGNE: Tensor, dkv_2KME: Sequence[Tensor]
    ) -> None:
        """See ``Kernel``."""
        for piece in self._steps[step]:
            for queries, keys, mask in self._bands(piece, saved.q_KGNE):
                part = Saved(*(tensor[:, :, queries] for tensor in saved))
                k, v = _repeated(kv_2KME, keys, saved.q_KGNE.shape[1])
                is_causal = piece.distance == 0 and mask is None
                dq, *dkv = self._rectangle.backward(part, k, v, is_causal=is_causal, mask=mask)
                dq_KGNE[:, :, queries].add_(dq)
                for target, gradient in zip(dkv_2KME, dkv, strict=True):
                    target[:, keys].add_(gradient.sum(1, dtype=target.dtype))


def bands(
    piece: Piece, window: int, *, cut: bool, like: Tensor
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Rows of queries and of keys, and the mask [queries, keys] to add if some keys are hidden from some queries.

    In bands of queries if the window is why, or with ``cut``; otherwise the piece as it is.
    """
    (first_query, last_query), (first_key, last_key) = piece.queries, piece.keys
    num_queries, num_keys = last_query - first_query, last_key - first_key
    if not piece.is_banded and not (cut and num_queries > BAND):
        yield slice(first_query, last_query), slice(first_key, last_key), None
        return
    reach = window if piece.is_banded else piece.distance + num_queries
    for start in range(0, num_queries, BAND):
        stop = min(start + BAND, num_queries)
        low = max(0, piece.distance + start - reach + 1)
        high = min(num_keys, piece.distance + stop)
        yield (
            slice(first_query + start, first_query + stop),
            slice(first_key + low, first_key + high),
            _mask((piece.distance + start, piece.distance + stop), (low, high), reach, like=like),
        )


def _mask(queries: tuple[int, int], keys: tuple[int, int], reach: int, *, like: Tensor) -> Tensor:
    """[queries, keys]: minus infinity where the key is not among the last ``reach`` up to the query; by positions."""
    ago = (
        torch.arange(*queries, device=like.device)[:, None] - torch.arange(*keys, device=like.device)[None, :]
    )
    return like.new_zeros(ago.shape).masked_fill_((ago < 0) | (ago >= reach), -torch.inf)


def _repeated(kv_2KME: Sequence[Tensor], rows: slice, num_queries: int) -> list[Tensor]:
    """The rows of keys and of values, one copy for each query head of theirs."""
    return [tensor[:, rows].unsqueeze(1).expand(-1, num_queries, -1, -1) for tensor in kv_2KME]
