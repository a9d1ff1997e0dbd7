"""Diff: names what differs, however each side is divided, and reads nothing where checksums say enough."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from distrain.checkpoint import diff as module
from distrain.checkpoint.diff import Difference, diff
from distrain.checkpoint.locate import locate
from distrain.checkpoint.tensors import TensorReader
from distrain.core.failpoints import FAILPOINTS
from distrain.core.protocols import ShardBox
from helpers.checkpoints import Shard, whole, write_checkpoint


def reader(path: Path) -> TensorReader:
    found = locate(path)
    return TensorReader(found.storage, found.folder, found.manifest)


def compare(first: Path, second: Path) -> list[Difference]:
    return list(diff(reader(first), reader(second)))


def rows(name: str, array: NDArray[Any], cuts: Sequence[int]) -> list[Shard]:
    """The array in slabs along dim 0."""
    edges = [0, *cuts, len(array)]
    return [
        (
            ShardBox(
                fqn=name,
                dtype=array.dtype.name,
                global_shape=array.shape,
                offset=(start, *(0,) * (array.ndim - 1)),
                shape=array[start:stop].shape,
            ),
            array[start:stop],
        )
        for start, stop in pairwise(edges)
    ]


def test_names_types_shapes_and_objects_are_compared(tmp_path: Path) -> None:
    five = np.zeros(5, np.float32)
    first = [whole("a", "float32", five), whole("b", "float32", five), whole("c", "float32", five)]
    second = [whole("b", "int32", five), whole("c", "float32", five[:4]), whole("d", "float32", five)]
    write_checkpoint(tmp_path / "first", [first], objects={"lr": 1, "same": 2, "gone": 3})
    write_checkpoint(tmp_path / "second", [second], objects={"lr": 1.0, "same": 2, "new": 3})
    assert [(d.name, d.what) for d in compare(tmp_path / "first", tmp_path / "second")] == [
        ("a", "only in the first"),
        ("b", "dtype"),
        ("c", "shape"),
        ("d", "only in the second"),
        ("gone", "only in the first"),
        ("lr", "object"),
        ("new", "only in the second"),
    ]


def test_values_are_compared_whatever_the_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ELEMENTS_AT_ONCE", 100)
    array = np.random.default_rng(0).standard_normal((60, 7))
    other = array.copy()
    other[50, 3] += 2.5
    other[1, 1] -= 1.0
    write_checkpoint(tmp_path / "first", [[shard] for shard in rows("w", array, [20, 41])])
    write_checkpoint(tmp_path / "same", [rows("w", array, [7])])
    write_checkpoint(tmp_path / "second", [rows("w", other, [])])
    assert compare(tmp_path / "first", tmp_path / "same") == []
    (found,) = compare(tmp_path / "first", tmp_path / "second")
    assert (found.name, found.what, found.num_elements) == ("w", "values", 2)
    assert found.max_abs == pytest.approx(2.5)


BFLOAT_ONE, BFLOAT_TWO = 0x3F80, 0x4000


@pytest.mark.parametrize(
    ("dtype", "first", "second", "largest"),
    [
        ("float32", [0.0, 1.0], [-0.0, 1.0], 0.0),
        ("float32", [np.nan, 1.0], [np.nan, 1.5], 0.5),
        ("float32", [np.inf, 1.0], [1.0, 1.0], 0.0),
        ("bool", [True, False], [True, True], 1.0),
        ("uint64", [0, 5], [3, 5], 3.0),
        ("complex64", [1j, 2], [-1j, 2], 2.0),
    ],
)
def test_single_elements(
    tmp_path: Path, dtype: str, first: list[Any], second: list[Any], largest: float
) -> None:
    for name, values in (("first", first), ("second", second)):
        write_checkpoint(tmp_path / name, [[whole("w", dtype, np.array(values, dtype))]])
    (found,) = compare(tmp_path / "first", tmp_path / "second")
    assert (found.num_elements, found.max_abs) == (1, largest)


@pytest.mark.parametrize(("dtype", "largest"), [("bfloat16", 1.0), ("float16", None), ("complex32", None)])
def test_types_that_numpy_lacks(tmp_path: Path, dtype: str, largest: float | None) -> None:
    size = {"bfloat16": np.uint16, "float16": np.uint16, "complex32": np.uint32}[dtype]
    for name, values in (("first", [BFLOAT_ONE, 0]), ("second", [BFLOAT_TWO, 0])):
        write_checkpoint(tmp_path / name, [[whole("w", dtype, np.array(values, size))]])
    (found,) = compare(tmp_path / "first", tmp_path / "second")
    assert found.num_elements == 1
    if dtype != "float16":
        assert found.max_abs == largest


def test_equal_checksums_are_not_read(tmp_path: Path) -> None:
    state = [whole("w", "float32", np.ones(1000, np.float32)), whole("n", "int64", np.array(3))]
    for name in ("first", "second"):
        write_checkpoint(tmp_path / name, [state])
    readers = [reader(tmp_path / name) for name in ("first", "second")]
    done: list[int] = []
    with FAILPOINTS.armed("checkpoint.pread", OSError(5, "must not be read")) as point:
        assert list(diff(*readers, progress=done.append)) == []
    assert point.hits == 0
    assert sum(done) == 4008
