"""Where the tokens of packed sequences lie: every one once, in its place, the causal work in balance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.core.errors import ConfigError
from distrain.parallel.sequence.layout import SequenceLayout, usp_degrees

lengths_of_any_size = st.lists(
    st.one_of(st.integers(1, 9), st.integers(1, 300), st.integers(1, 5000)), max_size=40
)
degrees = st.integers(1, 5)


@given(lengths_of_any_size, degrees, degrees, st.integers(1, 4))
def test_every_token_lies_on_one_rank_with_its_position(
    lengths: list[int], ulysses: int, ring: int, multiple_of: int
) -> None:
    layout = SequenceLayout.build(lengths, ulysses=ulysses, ring=ring, multiple_of=multiple_of)
    tokens = np.concatenate([layout.tokens(index) for index in range(layout.degree)])
    positions = np.concatenate([layout.positions(index) for index in range(layout.degree)])

    assert layout.num_local % multiple_of == 0
    assert len(tokens) == layout.num_local * layout.degree
    real = tokens >= 0
    assert sorted(tokens[real]) == list(range(sum(lengths)))
    expected = np.concatenate([np.arange(length) for length in lengths]) if lengths else tokens[real]
    assert (positions[real] == expected[tokens[real]]).all()
    assert not positions[~real].any()


@given(lengths_of_any_size, degrees, degrees)
def test_padding_is_less_than_one_token_a_rank_and_one_a_place(
    lengths: list[int], ulysses: int, ring: int
) -> None:
    layout = SequenceLayout.build(lengths, ulysses=ulysses, ring=ring)
    assert layout.num_local * layout.degree - sum(lengths) < layout.degree + ring


@given(
    st.lists(st.integers(1000, 30_000), min_size=1, max_size=6),
    st.lists(st.integers(1, 400), max_size=60),
    st.integers(2, 8),
)
def test_places_of_a_ring_get_the_same_causal_work_within_a_tenth(
    long: list[int], short: list[int], ring: int
) -> None:
    lengths = [*long, *short]
    layout = SequenceLayout.build(lengths, ring=ring)
    work = []
    for index in range(ring):
        seen = layout.positions(index)[layout.tokens(index) >= 0] + 1
        work.append(int(seen.sum()))
    assert max(work) <= 1.1 * sum(work) / ring


def test_a_long_sequence_is_cut_in_zigzag_and_short_ones_stay_whole() -> None:
    layout = SequenceLayout.build([10, 800, 10], ring=2)
    first, second = ([(s.sequence, s.start, s.stop) for s in place] for place in layout.places)
    assert first == [(1, 0, 200), (1, 600, 800), (0, 0, 10)]
    assert second == [(1, 200, 600), (2, 0, 10)]
    assert layout.num_travelling == 400


def test_ulysses_cuts_wherever_it_falls() -> None:
    layout = SequenceLayout.build([3, 2], ulysses=4)
    assert [list(layout.tokens(index)) for index in range(4)] == [[0, 1], [2, 3], [4, -1], [-1, -1]]
    assert [list(layout.positions(index)) for index in range(4)] == [[0, 1], [2, 0], [1, 0], [0, 0]]


def test_a_group_without_sequences_has_no_tokens() -> None:
    layout = SequenceLayout.build([], ulysses=2, ring=2, multiple_of=8)
    assert layout.num_local == 0
    assert layout.tokens(3).shape == layout.positions(3).shape == (0,)


def test_everything_wrong_is_refused_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        SequenceLayout.build([4, 0, -1], ulysses=0)
    text = str(caught.value)
    assert "ulysses must be at least 1" in text and "sequence 1: 0, sequence 2: -1" in text


@pytest.mark.parametrize(
    ("degree", "num_heads", "expected"), [(8, 16, (8, 1)), (8, 4, (4, 2)), (4, 6, (2, 2)), (3, 8, (1, 3))]
)
def test_ranks_beyond_the_heads_form_a_ring(degree: int, num_heads: int, expected: tuple[int, int]) -> None:
    assert usp_degrees(degree, num_heads=num_heads) == expected
