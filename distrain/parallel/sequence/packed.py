"""Attention of many pieces in one launch: variable-length flash attention on CUDA, for float16 and bfloat16.

The pieces of a step that differ only in length make one call: queries and keys are gathered to lie packed, with their
cumulative lengths. Flash aligns a window to the ends of both, so that a piece which a window cuts gets a width of its
own, and a call with those alike. Its kernels take heads of a multiple of eight features, up to 256: others are filled
up with zeros, which change neither scores nor outputs, or left to ``loop``.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .varlen import Piece, Saved, merge

MULTIPLE = 8
"""of the features of a head, in what flash computes"""
MOST_FEATURES = 256
OLDEST = (8, 0)
"""compute capability of the first GPUs that it runs on, Ampere"""


class Call(NamedTuple):
    """Pieces of one launch. Query i of n sees keys i + m - n - left to i + m - n + right of m; -1 is no limit."""

    left: int
    right: int
    is_own: bool
    """whether the keys are those of the queries' own tokens"""
    queries: Tensor
    """rows of the queries, piece by piece"""
    keys: Tensor
    starts_q: Tensor
    """where in ``queries`` each piece begins, and the end; int32"""
    starts_k: Tensor
    longest_q: int
    longest_k: int


class Varlen(Protocol):
    """Packed attention: q [Q, H, E], k and v [M, K, E], E a multiple of ``MULTIPLE``, LSE [H, Q].

    Scores are q k^T ``scale``.
    """

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Output and LSE."""

    def backward(
        self,
        call: Call,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
    ) -> Sequence[Tensor]:
        """Gradients of q, k and v."""


class FlashCuda:
    """torch's flash attention.

    Its operators are called rather than ``torch.nn.attention.varlen``, which calls them too, because the backward
    pass of a piece takes output and LSE over all pieces. torch's ``activate_flash_attention_impl`` puts a newer
    flash-attn in their place.
    """

    @staticmethod
    def serves(device: torch.device, dtype: torch.dtype, *, num_features: int) -> bool:
        """Whether it can compute heads of so many features there."""
        return (
            device.type == "cuda"
            and dtype in (torch.float16, torch.bfloat16)
            and num_features <= MOST_FEATURES
            and torch.cuda.get_device_capability(device) >= OLDEST
        )

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """See ``Varlen``."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *call[-4:], 0.0, _is_causal(call), False,
            scale=scale, window_size_left=call.left, window_size_right=call.right,
        )  # fmt: skip
        return out, lse

    def backward(
        self,
        call: Call,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
    ) -> Sequence[Tensor]:
        """See ``Varlen``."""
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
            grad, q, k, v, out, lse, *call[-4:], 0.0, _is_causal(call), no_dropout, no_dropout,
            scale=scale, window_size_left=call.left, window_size_right=call.right,
        )  # fmt: skip


def _is_causal(call: Call) -> bool:
    return call.left < 0 and call.right == 0


class PackedKernel:
    """The ``Kernel`` of few launches; index tensors are made once and serve all layers."""

    def __init__(
        self, steps: Sequence[Sequence[Piece]], *, window: int, device: torch.device, varlen: Varlen
    ) -> None:
        self._steps = [_calls(pieces, window, device) for pieces in steps]
        self._varlen = varlen

    def forward(
        self, step: int, q_KGNE: Tensor, kv_2KME: Sequence[Tensor], out_KGNE: Tensor, lse_KGN: Tensor
    ) -> None:
        """See ``Kernel``."""
        for call in self._steps[step]:
            q = _taken(q_KGNE.flatten(0, 1), call.queries)
            k, v = (_taken(tensor, call.keys) for tensor in kv_2KME)
            out_QHE, lse_HQ = self._varlen.forward(call, q, k, v, scale=_scale(q_KGNE))
            out: Tensor = (
                out_QHE[..., : q_KGNE.shape[-1]]
                .transpose(0, 1)
                .unflatten(0, out_KGNE.shape[:2])
                .to(out_KGNE.dtype)
            )
            lse: Tensor = lse_HQ.unflatten(0, out_KGNE.shape[:2])
            if not call.is_own:
                before, before_lse = out_KGNE[:, :, call.queries], lse_KGN[:, :, call.queries]
                merge(before, before_lse, out, lse)
                out, lse = before, before_lse
            out_KGNE[:, :, call.queries], lse_KGN[:, :, call.queries] = out, lse

    def backward(
        self, step: int, saved: Saved, kv_2KME: Sequence[Tensor], dq_KGNE: Tensor, dkv_2KME: Sequence[Tensor]
    ) -> None:
        """See ``Kernel``."""
        for call in self._steps[step]:
            grad, q, out = (_taken(tensor.flatten(0, 1), call.queries) for tensor in saved[:3])
            k, v = (_taken(tensor, call.keys) for tensor in kv_2KME)
            lse = saved.lse_KGN.flatten(0, 1)[:, call.queries]
            gradients = self._varlen.backward(call, grad, q, k, v, out, lse, scale=_scale(saved.q_KGNE))
            dq, *dkv = (gradient[..., : saved.q_KGNE.shape[-1]] for gradient in gradients)
            dq_KGNE.flatten(0, 1).index_add_(1, call.queries, dq.transpose(0, 1).to(dq_KGNE.dtype))
            for target, gradient in zip(dkv_2KME, dkv, strict=True):
                target.index_add_(1, call.keys, gradient.transpose(0, 1).to(target.dtype))


def _calls(pieces: Sequence[Piece], window: int, device: torch.device) -> list[Call]:
    """In the order of the pieces, so that rows are written before they are merged with; once a call at most."""
    alike: dict[tuple[int, int, bool], list[list[Piece]]] = {}
    for piece in pieces:
        rounds = alike.setdefault((*_window(piece, window), piece.distance == 0), [])
        below = (some for some in rounds if some[-1].queries[1] <= piece.queries[0])
        if some := next(below, None):
            some.append(piece)
        else:
            rounds.append([piece])
    return [_call(kind, some, device) for kind, rounds in alike.items() for some in rounds]


def _call(kind: tuple[int, int, bool], pieces: Sequence[Piece], device: torch.device) -> Call:
    queries, starts_q, longest_q = _packing([piece.queries for piece in pieces], device)
    keys, starts_k, longest_k = _packing([piece.keys for piece in pieces], device)
    return Call(*kind, queries, keys, starts_q, starts_k, longest_q, longest_k)


def _window(piece: Piece, window: int) -> tuple[int, int]:
    """Keys to the left and to the right that flash is to show."""
    right = 0 if piece.distance == 0 else -1
    if not piece.is_banded:
        return -1, right
    longer_keys = (piece.keys[1] - piece.keys[0]) - (piece.queries[1] - piece.queries[0])
    return longer_keys - piece.distance + window - 1, right


def _packing(ranges: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Rows of the ranges one after the other, where each begins and the last ends, and the longest."""
    rows = torch.cat([torch.arange(start, stop) for start, stop in ranges])
    lengths = torch.tensor([0, *(stop - start for start, stop in ranges)])
    return _sent(rows, device), _sent(lengths.cumsum(0).int(), device), int(lengths.max())


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On ``device``; a GPU takes it from pinned memory, so that nobody waits for what it has to do before."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _taken(heads_HNE: Tensor, rows: Tensor) -> Tensor:
    """[H, N, E] -> [rows, H, E filled up], contiguous."""
    taken, missing = heads_HNE.transpose(0, 1)[rows], -heads_HNE.shape[-1] % MULTIPLE
    return F.pad(taken, (0, missing)) if missing else taken


def _scale(q: Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1])
