"""Attention of many pieces in one launch: variable-length flash attention on CUDA, for float16 and bfloat16.

The pieces of a step that differ only in length make one call: queries and keys are gathered to lie packed, with their
cumulative lengths. Flash aligns a window to the ends of both, so that one with ``distance`` needs a width of its own,
and a call of its own.

torch's operator is called rather than ``torch.nn.attention.varlen``, which calls it too, because the backward pass of
a piece takes the LSE over all pieces. A newer flash-attn takes its place by torch's ``activate_flash_attention_impl``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .loop import merge
from .varlen import Piece, Saved


class _Call(NamedTuple):
    """Pieces of one launch; windows as flash counts them: keys to the left and right of the aligned one, -1: all."""

    left: int
    right: int
    is_own: bool
    queries: Tensor
    keys: Tensor
    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int


class PackedKernel:
    """The ``Kernel`` for CUDA; index tensors are made once and serve all layers."""

    def __init__(self, steps: Sequence[Sequence[Piece]], *, window: int, device: torch.device) -> None:
        self._steps = [_calls(pieces, window, device) for pieces in steps]

    def forward(
        self, step: int, q_KGNE: Tensor, kv_2KME: Sequence[Tensor], out_KGNE: Tensor, lse_KGN: Tensor
    ) -> None:
        """See ``Kernel``."""
        for call in self._steps[step]:
            q = _taken(q_KGNE.flatten(0, 1), call.queries)
            k, v = (_taken(tensor, call.keys) for tensor in kv_2KME)
            out, lse, *_ = torch.ops.aten._flash_attention_forward(
                q, k, v, call.starts_q, call.starts_k, call.longest_q, call.longest_k, 0.0,
                call.right == 0 and call.left < 0, False, window_size_left=call.left, window_size_right=call.right,
            )  # fmt: skip
            out_KGQE = out.transpose(0, 1).reshape(*out_KGNE.shape[:2], *out.shape[::2])
            lse_KGQ = lse.reshape(out_KGQE.shape[:3])
            if not call.is_own:
                before, before_lse = out_KGNE[:, :, call.queries], lse_KGN[:, :, call.queries]
                merge(before, before_lse, out_KGQE, lse_KGQ)
                out_KGQE, lse_KGQ = before, before_lse
            out_KGNE[:, :, call.queries] = out_KGQE.to(out_KGNE.dtype)
            lse_KGN[:, :, call.queries] = lse_KGQ

    def backward(
        self, step: int, saved: Saved, kv_2KME: Sequence[Tensor], dq_KGNE: Tensor, dkv_2KME: Sequence[Tensor]
    ) -> None:
        """See ``Kernel``."""
        for call in self._steps[step]:
            grad, q, out = (_taken(tensor.flatten(0, 1), call.queries) for tensor in saved[:3])
            k, v = (_taken(tensor, call.keys) for tensor in kv_2KME)
            lse = saved.lse_KGN.flatten(0, 1)[:, call.queries].contiguous()
            unused = torch.zeros(
                2, dtype=torch.uint64, device=q.device
            )  # the state of a dropout that is not there
            dq, *dkv = torch.ops.aten._flash_attention_backward(
                grad, q, k, v, out, lse, call.starts_q, call.starts_k, call.longest_q, call.longest_k, 0.0,
                call.right == 0 and call.left < 0, unused, unused,
                window_size_left=call.left, window_size_right=call.right,
            )  # fmt: skip
            dq_KGNE.flatten(0, 1).index_add_(1, call.queries, dq.transpose(0, 1).to(dq_KGNE.dtype))
            for target, gradient in zip(dkv_2KME, dkv, strict=True):
                target.index_add_(1, call.keys, gradient.transpose(0, 1).to(target.dtype))


def _calls(pieces: Sequence[Piece], window: int, device: torch.device) -> list[_Call]:
    alike: dict[tuple[bool, int, int], list[Piece]] = {}
    for piece in pieces:
        alike.setdefault((piece.distance == 0, *_window(piece, window)), []).append(piece)
    calls = []
    for (is_own, left, right), some in alike.items():
        queries, starts_q, longest_q = _packing([piece.queries for piece in some], device)
        keys, starts_k, longest_k = _packing([piece.keys for piece in some], device)
        calls.append(_Call(left, right, is_own, queries, keys, starts_q, starts_k, longest_q, longest_k))
    return calls


def _window(piece: Piece, window: int) -> tuple[int, int]:
    """Flash's window for a piece: query i of n sees keys i + m - n - left to i + m - n + right of m."""
    if not piece.is_banded:
        return -1, 0 if piece.distance == 0 else -1
    shift = (piece.keys[1] - piece.keys[0]) - (piece.queries[1] - piece.queries[0])
    return shift - piece.distance + window - 1, 0 if piece.distance == 0 else -1


def _packing(ranges: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Rows of the ranges one after the other, where each begins and the last ends, and the longest."""
    rows = torch.cat([torch.arange(start, stop) for start, stop in ranges])
    lengths = torch.tensor([0, *(stop - start for start, stop in ranges)])
    return rows.to(device), lengths.cumsum(0).to(device, torch.int32), int(lengths.max())


def _taken(heads_HNE: Tensor, rows: Tensor) -> Tensor:
    """[H, N, E] -> [rows, H, E], contiguous."""
    return heads_HNE.transpose(0, 1)[rows]
