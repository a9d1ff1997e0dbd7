"""The ranks of a node read what they share once, each an equal part, and all get every byte; or all hear why not."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrain.checkpoint.layout import EXTENT_BYTES, STRIDE
from distrain.checkpoint.locate import locate
from distrain.checkpoint.ranks import Ranks
from distrain.checkpoint.reshard import blobs, plan
from distrain.checkpoint.share import execute_together
from distrain.core import shared_memory
from distrain.core.errors import DataError
from distrain.core.failpoints import FAILPOINTS
from distrain.core.protocols import ShardBox
from helpers.checkpoints import whole, write_checkpoint
from helpers.ranks import RankFailure, run_ranks

pytestmark = pytest.mark.ranks

ROWS, COLUMNS = 40, EXTENT_BYTES // 4 // 4  # a quarter of an extent each: ten extents
NUM_EXTENTS = 10


def source() -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).integers(0, 2**32, (ROWS, COLUMNS), np.uint32)


def box(first: int, last: int) -> ShardBox:
    return ShardBox(
        fqn="w",
        dtype="float32",
        global_shape=(ROWS, COLUMNS),
        offset=(first, 0),
        shape=(last - first, COLUMNS),
    )


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_checkpoint(tmp_path, [[whole("w", "float32", source())]])
    return str(tmp_path)


def load(rank: int, first: int, last: int, folder: str) -> list[int]:
    """Load rows, compare them, and return the extents that this rank has read."""
    found = locate(folder)
    out = np.zeros((last - first, COLUMNS), np.uint32)
    read: list[int] = []
    open_writer = blobs(found.storage, found.folder, found.manifest)
    with FAILPOINTS.armed("checkpoint.read", lambda context: None) as point:
        point.hit = lambda context: read.append(context["extent"])  # type: ignore[method-assign]
        execute_together(
            plan([box(first, last)], found.manifest.tensors), open_writer, [out], node=Ranks().of_node()
        )
    assert np.array_equal(out, source()[first:last])
    return read


def replica(rank: int, world_size: int, folder: str) -> list[int]:
    return load(rank, 0, ROWS, folder)


def on_two_nodes(rank: int, world_size: int, folder: str) -> list[int]:
    os.environ["GROUP_RANK"] = str(rank // 2)
    return load(rank, 0, ROWS, folder)


def in_halves(rank: int, world_size: int, folder: str) -> list[int]:
    """The cut goes through an extent, which both need."""
    return load(rank, *((0, 18) if rank == 0 else (18, ROWS)), folder)


def without_a_window(rank: int, world_size: int, folder: str) -> list[int]:
    if rank == 1:
        shared_memory.is_ours = lambda fd, *, nbytes: False
    return load(rank, 0, ROWS, folder)


def test_replicas_read_every_extent_once(folder: str) -> None:
    read = run_ranks(replica, 4, folder)
    assert sorted(extent for each in read for extent in each) == list(range(NUM_EXTENTS))
    assert max(map(len, read)) - min(map(len, read)) <= 1


def test_every_node_reads_for_itself(folder: str) -> None:
    read = run_ranks(on_two_nodes, 4, folder)
    for node in (read[:2], read[2:]):
        assert sorted(extent for each in node for extent in each) == list(range(NUM_EXTENTS))


def test_what_one_rank_needs_it_reads_by_itself(folder: str) -> None:
    first, second = run_ranks(in_halves, 2, folder)
    counts = Counter(first + second)
    assert counts == dict.fromkeys(range(NUM_EXTENTS), 1)
    assert set(first) - {4} == set(range(4)) and set(second) - {4} == set(range(5, NUM_EXTENTS))


def test_without_memory_to_share_everybody_reads_all(folder: str) -> None:
    assert [sorted(each) for each in run_ranks(without_a_window, 2, folder)] == [list(range(NUM_EXTENTS))] * 2


def test_damage_that_one_rank_meets_is_told_to_all(folder: str) -> None:
    with open(Path(folder) / locate(folder).folder / "data" / "0" / "0", "r+b") as file:
        file.seek(7 * STRIDE + 99)
        file.write(b"\0\1\2\3")
    with pytest.raises(RankFailure) as failure:
        run_ranks(replica, 2, folder)
    assert len(failure.value.failures) == 2
    for text in failure.value.failures.values():
        assert DataError.__name__ in text and "extent 7" in text
