"""Runs of a flattened tensor as boxes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.core.boxes import runs_to_boxes
from distrain.core.protocols import ShardBox


def box(shape: tuple[int, ...], offset: tuple[int, ...] = (), whole: tuple[int, ...] = ()) -> ShardBox:
    return ShardBox(
        fqn="w", dtype="float32", global_shape=whole or shape, offset=offset or (0,) * len(shape), shape=shape
    )


def test_the_picture_of_the_module() -> None:
    boxes = [(each.offset, each.shape, at) for each, at in runs_to_boxes(box((4, 6)), first=3, count=17)]
    assert boxes == [((0, 3), (1, 3), 0), ((1, 0), (2, 6), 3), ((3, 0), (1, 2), 15)]


@given(data=st.data(), shape=st.lists(st.integers(1, 5), max_size=4).map(tuple))
def test_boxes_hold_the_run_in_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    first = data.draw(st.integers(0, size))
    count = data.draw(st.integers(0, size - first))
    offset = tuple(data.draw(st.integers(0, 3)) for _ in shape)
    whole = np.arange(math.prod(n + 4 for n in shape)).reshape([n + 4 for n in shape])
    local = whole[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))]
    held: list[int] = []
    for each, at in runs_to_boxes(box(shape, offset, whole.shape), first=first, count=count):
        assert at == len(held)
        part = whole[tuple(slice(a, a + n) for a, n in zip(each.offset, each.shape, strict=True))]
        held += part.flatten().tolist()
    assert held == local.flatten()[first : first + count].tolist()


def test_a_run_has_few_boxes() -> None:
    assert len(list(runs_to_boxes(box((9, 8, 7)), first=10, count=300))) <= 5


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (20, 10), (0, -1)])
def test_a_run_outside_is_refused(first: int, count: int) -> None:
    with pytest.raises(ValueError, match="elements"):
        list(runs_to_boxes(box((4, 6)), first=first, count=count))
