"""Who writes what: every element once, by a rank that has it, evenly, and the same computed by all."""

from dataclasses import replace
from itertools import pairwise
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.checkpoint.divide import divide, overlapping
from distrain.checkpoint.layout import box_bytes
from distrain.core.errors import ConfigError
from distrain.core.protocols import ShardBox


def box(
    name: str, *shape: int, offset: tuple[int, ...] | None = None, whole: tuple[int, ...] | None = None
) -> ShardBox:
    return ShardBox(
        fqn=name,
        dtype="float32",
        global_shape=whole or shape,
        offset=offset or (0,) * len(shape),
        shape=shape,
    )


@st.composite
def held_by_ranks(draw: st.DrawFn) -> list[list[ShardBox]]:
    """Tensors cut along one dim into shards, each held by some ranks."""
    num_ranks = draw(st.integers(1, 5))
    held: list[list[ShardBox]] = [[] for _ in range(num_ranks)]
    for i in range(draw(st.integers(0, 6))):
        shape = tuple(draw(st.lists(st.sampled_from((0, 1, 2, 7, 600)), max_size=3)))
        cuts = sorted(draw(st.lists(st.integers(0, shape[0]), max_size=2))) if shape else []
        edges = [0, *cuts, shape[0]] if shape else [0, 0]
        for start, stop in pairwise(edges):
            offset = (start, *(0,) * (len(shape) - 1)) if shape else ()
            part = box(f"t{i}", *((stop - start, *shape[1:]) if shape else ()), offset=offset, whole=shape)
            for rank in draw(st.sets(st.integers(0, num_ranks - 1), min_size=1)):
                held[rank].append(part)
    return held


@given(held_by_ranks())
def test_every_element_is_written_once_by_a_rank_that_holds_it(held: list[list[ShardBox]]) -> None:
    written = divide(held)
    counts = {b.fqn: np.zeros(b.global_shape, np.int8) for mine in held for b in mine}
    wanted = {name: np.zeros_like(count) for name, count in counts.items()}
    for mine in held:
        for b in mine:
            wanted[b.fqn][tuple(slice(a, a + n) for a, n in zip(b.offset, b.shape, strict=True))] = 1
    for mine, parts in zip(held, written, strict=True):
        for part in parts:
            region = tuple(slice(a, a + n) for a, n in zip(part.offset, part.shape, strict=True))
            counts[part.fqn][region] += 1
            assert any(within(part, b) for b in mine)
    for name, count in counts.items():
        assert np.array_equal(count, wanted[name])
    named = {part.fqn for parts in written for part in parts}
    assert named == {b.fqn for mine in held for b in mine}, "a tensor without elements is written too"


def within(part: ShardBox, whole: ShardBox) -> bool:
    dims = zip(part.offset, part.shape, whole.offset, whole.shape, strict=True)
    return part.fqn == whole.fqn and all(a >= b and a + n <= b + m for a, n, b, m in dims)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_replicas_share_the_bytes_evenly(num_ranks: int) -> None:
    state = [box(f"w{i}", 1000 + i, 700) for i in range(4)] + [box(f"n{i}", 512) for i in range(40)]
    loads = [sum(map(box_bytes, parts)) for parts in divide([state] * num_ranks)]
    assert sum(loads) == sum(map(box_bytes, state))
    assert max(loads) <= 1.02 * sum(loads) / num_ranks


def test_what_only_one_rank_holds_counts_when_the_rest_is_dealt_out() -> None:
    shared = [box(f"n{i}", 1000) for i in range(60)]
    own = box("own", 20_000)
    first, second = divide([[own, *shared], shared])
    assert own in first
    loads = [sum(map(box_bytes, parts)) for parts in (first, second)]
    assert abs(loads[0] - loads[1]) <= box_bytes(shared[0])


def test_each_ranks_parts_come_in_the_order_in_which_it_holds_them() -> None:
    state = [box(f"w{i}", 1000, 700) for i in (3, 1, 2)]
    for parts in divide([state, state]):
        assert [part.fqn for part in parts] == ["w3", "w1", "w2"]


def test_ranks_that_disagree_about_tensors_are_all_named() -> None:
    mine = [box("a", 4), box("b", 4), box("c", 4)]
    theirs = [replace(mine[0], dtype="int32"), box("b", 5), mine[2]]
    with pytest.raises(ConfigError) as caught:
        divide([mine, theirs])
    assert [problem.error for problem in caught.value.problems] == [
        "ranks disagree about a",
        "ranks disagree about b",
    ]
    assert "rank 0" in caught.value.problems[0].got and "rank 1" in caught.value.problems[0].got


def test_parts_that_overlap_without_being_equal_are_refused() -> None:
    upper, lower = box("a", 3, 2, whole=(4, 2)), box("a", 2, 2, offset=(2, 0), whole=(4, 2))
    with pytest.raises(ConfigError, match="parts of a that overlap"):
        divide([[upper], [lower]])


@given(
    st.lists(
        st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 4), st.integers(0, 4)), max_size=12
    )
)
def test_overlaps_are_found_as_comparing_all_pairs_finds_them(rows: list[tuple[int, int, int, int]]) -> None:
    boxes = [box("a", n, m, offset=(y, x), whole=(12, 12)) for y, x, n, m in rows]

    def meet(a: ShardBox, b: ShardBox) -> bool:
        dims = zip(a.offset, a.shape, b.offset, b.shape, strict=True)
        return all(max(p, q) < min(p + n, q + m) for p, n, q, m in dims)

    expected = any(
        meet(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if prod(a.shape) and prod(b.shape)
    )
    found = overlapping(boxes)
    assert (found is not None) == expected
    if found:
        assert meet(*found)
