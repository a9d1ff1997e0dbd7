"""Deals the sequences of a global batch to micro-batches and replicas, and pads them into arrays.

A pure function of the batch, so that every rank knows what all the others do, shapes included. Sequences of one
length are dealt in order. If lengths differ, similar ones share a micro-batch (little padding), the longest come
first (memory runs out at once or never), and within a micro-batch the replicas get about as many tokens each::

    lengths 9 1 5 7 3 8 2 6, dp = 2, micro_batches = 2

                    replica 0    replica 1
    micro-batch 0     9 6          8 7        15 tokens each
    micro-batch 1     5 1          3 2         6 and 5
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from distrain.core.errors import ConfigError

from .batches import GlobalBatch
from .tokenizer import Ids

IGNORED = -100  # the target that torch's cross entropy leaves out
PADDING = 0  # any id would do: with causal attention no real position sees the padding behind it


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Sequences that one replica puts through the model at once, as an array [rows, padded_len]."""

    ids: Ids
    """int64 [rows], the sequences' numbers"""
    lengths: Ids
    """int64 [rows], predicted tokens of each"""
    padded_len: int

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return len(self.ids)


def split(
    batch: GlobalBatch, *, dp: int, micro_batches: int, multiple_of: int = 1
) -> tuple[tuple[MicroBatch, ...], ...]:
    """The batch as ``[micro_batch][replica]``, each sequence in exactly one place, the same number in every place.

    ``multiple_of`` rounds padded lengths up (sequence parallelism needs a multiple of tp). Raises ConfigError unless
    ``dp * micro_batches`` divides the number of sequences.
    """
    num_places = dp * micro_batches
    if num_places < 1 or len(batch.ids) % num_places:
        raise ConfigError(
            "dp times parallel.micro_batches does not divide data.global_batch",
            got=f"global_batch = {len(batch.ids)}, dp = {dp}, micro_batches = {micro_batches}",
            allowed=f"a multiple of {max(1, num_places)} sequences",
            hint="change data.global_batch or parallel.micro_batches",
        )
    if len(np.unique(batch.lengths)) == 1:
        places = np.arange(len(batch.ids)).reshape(micro_batches, dp, -1).tolist()
    else:
        longest_first = np.argsort(-batch.lengths, kind="stable").reshape(micro_batches, -1)
        places = [_deal(chunk.tolist(), batch.lengths.tolist(), dp) for chunk in longest_first]
    return tuple(tuple(_micro_batch(batch, rows, multiple_of) for rows in replicas) for replicas in places)


def collate(sequences: Iterable[Ids], *, padded_len: int) -> tuple[Ids, Ids]:
    """Inputs and targets, int64 [rows, padded_len] each; targets on padding are -100."""
    rows = list(sequences)
    inputs = np.full((len(rows), padded_len), PADDING, dtype=np.int64)
    targets = np.full((len(rows), padded_len), IGNORED, dtype=np.int64)
    for row, tokens in enumerate(rows):
        length = len(tokens) - 1
        inputs[row, :length] = tokens[:-1]
        targets[row, :length] = tokens[1:]
    return inputs, targets


def pack(sequences: Sequence[Ids], tokens: Ids) -> tuple[Ids, Ids]:
    """Inputs and targets, int64 [1, n] each, of some ``tokens`` [n] of ``sequences`` laid one behind the other.

    Tokens are numbered by what is predicted: a sequence of n + 1 ids has n. -1 is padding, without a target.
    """
    inputs = np.concatenate([*(ids[:-1] for ids in sequences), [PADDING]])
    targets = np.concatenate([*(ids[1:] for ids in sequences), [IGNORED]])
    return inputs[None, tokens], targets[None, tokens]


def _deal(longest_first: list[int], lengths: list[int], dp: int) -> list[list[int]]:
    """Each to the replica with the fewest tokens among those that have room left (LPT)."""
    rows = len(longest_first) // dp
    shares: list[list[int]] = [[] for _ in range(dp)]
    loads = [(0, replica) for replica in range(dp)]
    for index in longest_first:
        load, replica = heapq.heappop(loads)
        shares[replica].append(index)
        if len(shares[replica]) < rows:
            heapq.heappush(loads, (load + lengths[index], replica))
    return shares


def _micro_batch(batch: GlobalBatch, rows: Sequence[int], multiple_of: int) -> MicroBatch:
    lengths = batch.lengths[rows]
    return MicroBatch(batch.ids[rows], lengths, -(-int(lengths.max()) // multiple_of) * multiple_of)
