"""Attention of packed sequences, piece by piece, none across sequences.

A *piece* is a rectangle of the attention matrix: some queries of a sequence against some of its keys. On one rank
there is one a sequence, its lower triangle. In a ring the keys arrive in portions, and a piece is what a portion adds.
Each gives a partial output and the logarithm of its softmax's denominator (LSE), by which partial outputs merge
exactly (Milakov & Gimelshein 2018). The backward pass of a piece needs only the final LSE and output.

Pieces by portion of a sequence with chunks a b c d on two places, a and d here, b and c there::

       queries      keys:  a d   b c
          a                t .   . .      t  lower triangle
          d                # t   # #      #  all

With a window, each query sees the last ``window`` tokens up to itself: pieces out of sight are left out, pieces in
part are computed in bands of queries, each against the keys that one of them sees.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .layout import Span


class Piece(NamedTuple):
    """Queries [start, stop) against keys [start, stop), by rows; every query sees at least one of the keys."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    distance: int
    """position of the first query minus that of the first key; 0: these are the same tokens"""
    is_banded: bool
    """whether the window hides keys of the piece from some of its queries"""


def pieces(mine: Sequence[Span], theirs: Sequence[Span], *, window: int = 0) -> tuple[Piece, ...]:
    """What queries in ``mine`` have to do with keys in ``theirs``; the spans of two places, or twice of the same.

    Those of the same tokens come first. ``window`` 0 is none.
    """
    if window == 0 and mine == theirs:
        return tuple(Piece((row, end), (row, end), 0, False) for row, end in _sequences(mine))
    of_sequence: dict[int, list[Span]] = {}
    for span in theirs:
        of_sequence.setdefault(span.sequence, []).append(span)
    found = [
        piece
        for queries in mine
        for keys in of_sequence.get(queries.sequence, ())
        if (piece := _piece(queries, keys, window))
    ]
    return tuple(_joined(sorted(found, key=lambda piece: piece.distance != 0)))


def _sequences(spans: Sequence[Span]) -> Iterator[tuple[int, int]]:
    """Rows of each sequence: without a window, its spans on one place make one triangle."""
    for _, of_sequence in groupby(spans, key=lambda span: span.sequence):
        parts = list(of_sequence)
        yield parts[0].row, parts[-1].end_row


def _piece(queries: Span, keys: Span, window: int) -> Piece | None:
    if keys.start > queries.start:
        return None
    if keys.start == queries.start:
        rows = (queries.row, queries.end_row)
        return Piece(rows, rows, 0, 0 < window < queries.stop - queries.start)
    start, stop = keys.start, queries.stop
    if window:
        start = max(start, queries.start - window + 1)
        stop = min(stop, keys.stop - 1 + window)
    if start >= keys.stop or queries.start >= stop:
        return None
    return Piece(
        (queries.row, queries.row + stop - queries.start),
        (keys.row + start - keys.start, keys.end_row),
        queries.start - start,
        0 < window <= stop - 1 - start,
    )


def _joined(found: list[Piece]) -> Iterator[Piece]:
    """Full rectangles beside or below each other become one."""
    last: Piece | None = None
    for piece in found:
        if last is not None and last.distance and not (last.is_banded or piece.is_banded):
            if last.queries == piece.queries and last.keys[1] == piece.keys[0]:
                last = last._replace(keys=(last.keys[0], piece.keys[1]))
                continue
            if last.keys == piece.keys and last.queries[1] == piece.queries[0]:
                last = last._replace(queries=(last.queries[0], piece.queries[1]))
                continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


class Kernel(Protocol):
    """Computes the pieces of each step of a ring, adding to what is there.

    Shapes: K key/value heads, G query heads for each, N own tokens, M tokens of the portion, E features. ``out`` and
    the gradients have at least float32's precision if there is more than one step. Rows of padding stay as they are.
    """

    def forward(
        self, step: int, q_KGNE: Tensor, kv_2KME: Sequence[Tensor], out_KGNE: Tensor, lse_KGN: Tensor
    ) -> None:
        """Merge the pieces of ``step`` into ``out`` and ``lse``; step 0 writes them first."""

    def backward(
        self,
        step: int,
        saved: "Saved",
        kv_2KME: Sequence[Tensor],
        dq_KGNE: Tensor,
        dkv_2KME: Sequence[Tensor],
    ) -> None:
        """Add the gradients of the pieces of ``step``."""


class Saved(NamedTuple):
    """What the backward pass of a step needs of the queries' side."""

    grad_KGNE: Tensor
    q_KGNE: Tensor
    out_KGNE: Tensor
    lse_KGN: Tensor


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Add to the partial attention ``out`` [..., N, E] with ``lse`` [..., N] what another part of the keys gives."""
    total = torch.logaddexp(lse, other_lse)
    out.mul_((lse - total).exp_().unsqueeze(-1))
    out.addcmul_(other.to(out.dtype), (other_lse - total).exp_().unsqueeze(-1))
    lse.copy_(total)
