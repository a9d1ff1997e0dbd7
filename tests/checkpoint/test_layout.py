"""Where bytes lie: pieces never overlap, segments never touch a gap, and a layout survives JSON, or is refused."""

import copy
from itertools import pairwise
from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.layout import (
    ALIGN_BYTES,
    DTYPES,
    EXTENT_BYTES,
    GAP_BYTES,
    PAGE_ALIGN_FROM,
    STRIDE,
    WriterLayout,
    pack,
    segments,
)
from distrain.core.errors import ConfigError
from distrain.core.protocols import ShardBox


def box(name: str, *shape: int, dtype: str = "float32") -> ShardBox:
    zeros = (0,) * len(shape)
    return ShardBox(fqn=name, dtype=dtype, global_shape=shape, offset=zeros, shape=shape)


@st.composite
def boxes(draw: st.DrawFn) -> list[ShardBox]:
    count = draw(st.integers(0, 6))
    shapes = st.lists(st.one_of(st.integers(0, 5), st.integers(500, 3000)), max_size=2)
    return [box(f"t{i}", *draw(shapes), dtype=draw(st.sampled_from(sorted(DTYPES)))) for i in range(count)]


@given(boxes())
def test_pieces_keep_their_order_are_aligned_and_do_not_overlap(given_boxes: list[ShardBox]) -> None:
    layout = pack(3, given_boxes)
    assert [piece.box for piece in layout.pieces] == given_boxes
    assert all(a.offset + a.nbytes <= b.offset for a, b in pairwise(layout.pieces))
    for piece in layout.pieces:
        assert piece.nbytes == prod(piece.box.shape) * DTYPES[piece.box.dtype]
        assert piece.offset % (GAP_BYTES if piece.nbytes >= PAGE_ALIGN_FROM else ALIGN_BYTES) == 0
    assert layout.nbytes == max((p.offset + p.nbytes for p in layout.pieces), default=0)
    assert layout.num_extents * EXTENT_BYTES >= layout.nbytes > (layout.num_extents - 1) * EXTENT_BYTES
    assert layout.slot_bytes == layout.num_extents * STRIDE


@given(boxes())
def test_a_layout_survives_json_and_its_digest_tells_layouts_apart(given_boxes: list[ShardBox]) -> None:
    layout = pack(3, given_boxes)
    again = WriterLayout.from_json(layout.to_json())
    assert again == layout and again.digest == layout.digest
    assert pack(4, given_boxes).digest != layout.digest
    assert pack(3, [*given_boxes, box("more")]).digest != layout.digest


@given(st.integers(0, 3 * EXTENT_BYTES), st.integers(0, 3 * EXTENT_BYTES))
def test_segments_are_the_bytes_in_order_and_stay_out_of_gaps(offset: int, nbytes: int) -> None:
    done = 0
    for position, start, length in segments(offset, nbytes):
        assert start == done and length > 0
        extent, inside = divmod(position, STRIDE)
        assert inside + length <= EXTENT_BYTES
        assert extent * EXTENT_BYTES + inside == offset + done
        done += length
    assert done == nbytes


def test_types_that_cannot_be_saved_are_refused_all_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        pack(0, [box("a", dtype="quint8"), box("b"), box("c", dtype="object")])
    assert [problem.got for problem in caught.value.problems] == ["quint8", "object"]


GOOD = pack(1, [box("a", 4, 4), box("b", 3)]).to_json()


def edited(path: list[str | int], value: Any) -> Any:
    """``GOOD`` with another value at ``path``."""
    document = copy.deepcopy(GOOD)
    at = document
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["writer"], -1),
        (["writer"], True),
        (["writer"], 1.0),
        (["nbytes"], 2**63),
        (["nbytes"], 60),
        (["pieces"], {}),
        (["pieces", 0], ["a"]),
        (["pieces", 0, 0], ""),
        (["pieces", 0, 0], "a\0"),
        (["pieces", 0, 0], "a" * 5000),
        (["pieces", 0, 1], "float33"),
        (["pieces", 0, 1], ["float32"]),
        (["pieces", 0, 2], [4, -4]),
        (["pieces", 0, 2], [4, 2**62]),
        (["pieces", 0, 2], [4]),
        (["pieces", 0, 2], [1] * 100),
        (["pieces", 0, 3], [2, 0]),
        (["pieces", 0, 4], [4, "4"]),
        (["pieces", 0, 5], 32),
        (["pieces", 0, 5], 64),
        (["pieces", 0, 5], -64),
        (["pieces", 0, 5], 2**40),
    ],
)
def test_a_layout_that_is_wrong_anywhere_is_refused(path: list[str | int], value: Any) -> None:
    assert WriterLayout.from_json(GOOD).writer == 1
    with pytest.raises(DamageError):
        WriterLayout.from_json(edited(path, value))
