"""Save in one partition, commit, load in another: through real files, damaged or not."""

import math
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.layout import DTYPES, EXTENT_BYTES, STRIDE
from distrain.checkpoint.locate import locate
from distrain.checkpoint.reshard import blobs, execute, plan
from distrain.core.errors import DataError
from distrain.core.failpoints import FAILPOINTS
from distrain.core.protocols import ShardBox
from helpers.checkpoints import Shard, write_checkpoint
from helpers.checkpoints import whole as whole_shard

Point = tuple[int, ...]
Part = tuple[Point, Point]
UNITS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "V16"}


@st.composite
def partitions(draw: st.DrawFn, shape: Point) -> list[Part]:
    """A grid of uneven cuts along every dim; cuts at the same place make empty boxes."""
    edges = [[0, *sorted(draw(st.lists(st.integers(0, n), max_size=3))), n] for n in shape]
    parts: list[Part] = [((), ())]
    for cuts in edges:
        parts = [
            ((*offset, start), (*size, stop - start))
            for offset, size in parts
            for start, stop in pairwise(cuts)
        ]
    return parts


def cut(array: NDArray[Any], part: Part) -> NDArray[Any]:
    return array[tuple(slice(a, a + n) for a, n in zip(*part, strict=True))]


@settings(max_examples=25)
@given(st.data())
def test_whatever_partition_was_saved_loads_into_any_other(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 3))
    ranks: list[list[Shard]] = [[] for _ in range(num_ranks)]
    wholes, targets, out = {}, [], []
    for i in range(data.draw(st.integers(1, 4))):
        shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=3)))
        dtype = data.draw(st.sampled_from(sorted(DTYPES)))
        raw = np.random.default_rng(i).integers(0, 256, math.prod(shape) * DTYPES[dtype], np.uint8)
        array = wholes[f"t{i}"] = raw.view(UNITS[DTYPES[dtype]]).reshape(shape)

        def box(part: Part, name: str = f"t{i}", dtype: str = dtype, shape: Point = shape) -> ShardBox:
            return ShardBox(fqn=name, dtype=dtype, global_shape=shape, offset=part[0], shape=part[1])

        for part in data.draw(partitions(shape)):
            ranks[data.draw(st.integers(0, num_ranks - 1))].append((box(part), cut(array, part)))
        for part in data.draw(partitions(shape)):
            targets.append(box(part))
            out.append(np.zeros(part[1], array.dtype))
    with TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), ranks)
        found = locate(folder)
        open_writer = blobs(found.storage, found.folder, found.manifest)
        with FAILPOINTS.armed("checkpoint.read", ValueError("read twice"), on_hit=num_ranks + 1):
            execute(plan(targets, found.manifest.tensors), open_writer, out)  # an extent each: all are small
    for target, got in zip(targets, out, strict=True):
        assert got.tobytes() == cut(wholes[target.fqn], (target.offset, target.shape)).tobytes()


def test_tensors_of_several_extents_survive_a_change_of_axis(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 2**32, (3000, 3001), np.uint32)
    columns = [((0, a), (3000, b - a)) for a, b in ((0, 7), (7, 1500), (1500, 3001))]
    rows = [((a, 0), (b - a, 3001)) for a, b in ((0, 1), (1, 2999), (2999, 3000))]

    def box(part: Part) -> ShardBox:
        return ShardBox(fqn="w", dtype="float32", global_shape=array.shape, offset=part[0], shape=part[1])

    write_checkpoint(tmp_path, [[(box(part), cut(array, part))] for part in columns])
    found = locate(tmp_path)
    out = [np.zeros(part[1], np.uint32) for part in rows]
    todo = plan([box(part) for part in rows], found.manifest.tensors)
    execute(todo, blobs(found.storage, found.folder, found.manifest), out)
    assert all(np.array_equal(got, cut(array, part)) for got, part in zip(out, rows, strict=True))
    assert len(todo.reads) == sum(len(writer.crcs) for writer in found.manifest.writers) == 5


def test_a_flipped_bit_is_named_and_its_load_fails(tmp_path: Path) -> None:
    array = np.arange(EXTENT_BYTES // 2, dtype=np.uint32)  # two extents
    folder = write_checkpoint(tmp_path, [[whole_shard("w", "float32", array)]])
    with (folder / "data" / "0" / "0").open("r+b") as file:
        file.seek(STRIDE + 1234)
        byte = file.read(1)
        file.seek(STRIDE + 1234)
        file.write(bytes([byte[0] ^ 4]))
    found = locate(folder)
    todo = plan([whole_shard("w", "float32", array)[0]], found.manifest.tensors)
    with pytest.raises(DamageError, match=r"extent 1 .* is damaged"):
        execute(todo, blobs(found.storage, found.folder, found.manifest), [np.zeros_like(array)])


def test_the_newest_whole_checkpoint_is_found_and_a_folder_without_one_says_why(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, [[whole_shard("w", "uint8", np.zeros(5, np.uint8))]], step=step)
    (tmp_path / "step-00000003" / "data" / "0" / "0").unlink()
    assert locate(tmp_path).folder == "step-00000002"
    assert locate(tmp_path / "step-00000001").manifest.step == 1
    with pytest.raises(DataError, match="no whole checkpoint"):
        locate(tmp_path / "nothing")
