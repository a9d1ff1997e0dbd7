"""Dealing a batch to micro-batches and replicas, and padding it."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.core.errors import ConfigError
from distrain.train.data.batches import GlobalBatch
from distrain.train.data.micro import MicroBatch, collate, split


def batch_of(lengths: list[int]) -> GlobalBatch:
    return GlobalBatch(0, np.arange(100, 100 + len(lengths)), np.array(lengths, dtype=np.int64))


def lengths_of(dealt: tuple[tuple[MicroBatch, ...], ...]) -> list[list[list[int]]]:
    return [[share.lengths.tolist() for share in replicas] for replicas in dealt]


def test_long_sequences_come_first_and_replicas_are_balanced() -> None:
    dealt = split(batch_of([9, 1, 5, 7, 3, 8, 2, 6]), dp=2, micro_batches=2)
    assert lengths_of(dealt) == [
        [[9, 6], [8, 7]],
        [[5, 1], [3, 2]],
    ]
    assert [[share.padded_len for share in replicas] for replicas in dealt] == [[9, 8], [5, 3]]


def test_sequences_of_one_length_are_dealt_in_order() -> None:
    dealt = split(batch_of([4] * 12), dp=2, micro_batches=3)
    assert [[share.ids.tolist() for share in replicas] for replicas in dealt] == [
        [[100, 101], [102, 103]],
        [[104, 105], [106, 107]],
        [[108, 109], [110, 111]],
    ]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    dp, micro_batches, rows = (draw(st.integers(1, 5)) for _ in range(3))
    n = dp * micro_batches * rows
    return (
        draw(st.lists(st.integers(1, 500), min_size=n, max_size=n)),
        dp,
        micro_batches,
        draw(st.integers(1, 16)),
    )


@given(layouts())
def test_every_sequence_is_dealt_once_with_its_length_and_room_for_it(
    layout: tuple[list[int], int, int, int],
) -> None:
    lengths, dp, micro_batches, multiple_of = layout
    dealt = split(batch_of(lengths), dp=dp, micro_batches=micro_batches, multiple_of=multiple_of)
    assert [len(replicas) for replicas in dealt] == [dp] * micro_batches
    shares = [share for replicas in dealt for share in replicas]
    assert {share.rows for share in shares} == {len(lengths) // (dp * micro_batches)}
    pairs = [
        pair for share in shares for pair in zip(share.ids.tolist(), share.lengths.tolist(), strict=True)
    ]
    assert sorted(pairs) == list(enumerate(lengths, start=100))
    for share in shares:
        assert share.padded_len % multiple_of == 0
        assert 0 <= share.padded_len - share.lengths.max() < multiple_of


@given(layouts())
def test_micro_batches_hold_similar_lengths_and_replicas_similar_tokens(
    layout: tuple[list[int], int, int, int],
) -> None:
    lengths, dp, micro_batches, _ = layout
    dealt = split(batch_of(lengths), dp=dp, micro_batches=micro_batches)
    if len(set(lengths)) == 1:
        return
    spans = [np.concatenate([share.lengths for share in replicas]) for replicas in dealt]
    assert all(longer.min() >= shorter.max() for longer, shorter in pairwise(spans))
    for replicas, span in zip(dealt, spans, strict=True):
        tokens = [int(share.lengths.sum()) for share in replicas]
        assert max(tokens) - min(tokens) <= (span.max() - span.min()) * replicas[0].rows


@pytest.mark.parametrize(("n", "dp", "micro_batches"), [(7, 2, 1), (8, 3, 1), (8, 2, 3), (8, 0, 1)])
def test_a_batch_that_cannot_be_dealt_evenly_is_refused(n: int, dp: int, micro_batches: int) -> None:
    with pytest.raises(ConfigError, match=f"global_batch = {n}, dp = {dp}, micro_batches = {micro_batches}"):
        split(batch_of([5] * n), dp=dp, micro_batches=micro_batches)


def test_targets_are_the_inputs_one_ahead_and_padding_counts_for_nothing() -> None:
    inputs, targets = collate([np.array([5, 6, 7, 8]), np.array([9, 1])], padded_len=4)
    assert inputs.tolist() == [[5, 6, 7, 0], [9, 0, 0, 0]]
    assert targets.tolist() == [[6, 7, 8, -100], [1, -100, -100, -100]]
    assert inputs.dtype == targets.dtype == np.int64


def test_a_sequence_longer_than_its_array_is_refused() -> None:
    with pytest.raises(ValueError):
        collate([np.arange(6)], padded_len=4)
