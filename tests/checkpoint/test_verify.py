"""Damage anywhere is named by verify and never loaded; restoring falls back to the newest good checkpoint."""

import errno
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distrain.checkpoint.blob import tail_of
from distrain.checkpoint.candidates import candidates
from distrain.checkpoint.layout import EXTENT_BYTES, STRIDE
from distrain.checkpoint.tensors import TensorReader
from distrain.checkpoint.tiers import posix
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.checkpoint.verify import Damage, verify
from distrain.core.errors import DataError
from distrain.core.failpoints import FAILPOINTS
from distrain.core.protocols import ShardBox
from helpers.checkpoints import Shard, write_checkpoint

BIG = EXTENT_BYTES + (1 << 20)
"""bytes of tensor "big", all of writer 0, whose second extent also holds "tail" """


@cache
def shards(step: int) -> list[list[Shard]]:
    values = np.random.default_rng(step)

    def shard(name: str, size: int, start: int, whole: int) -> Shard:
        box = ShardBox(fqn=name, dtype="uint8", global_shape=(whole,), offset=(start,), shape=(size,))
        return box, values.integers(0, 256, size, dtype=np.uint8)

    return [
        [shard("big", BIG, 0, BIG), shard("tail", 500, 0, 1000)],
        [shard("tail", 500, 500, 1000), shard("own", 70, 0, 70)],
    ]


@cache
def truth(step: int) -> dict[str, NDArray[Any]]:
    (big, head), (rest, own) = shards(step)
    return {"big": big[1], "tail": np.concatenate([head[1], rest[1]]), "own": own[1]}


@pytest.fixture(autouse=True)
def _through_the_page_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """O_DIRECT would wait for a disk after every change."""
    monkeypatch.setattr(posix, "_O_DIRECT", 0)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with steps 1 and 2."""
    root = tmp_path_factory.mktemp("pristine")
    for step in (1, 2):
        write_checkpoint(root, shards(step), step=step)
    yield root
    assert damages(root) == [], "a test has not put back what it changed"


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "root"))


def damages(root: Path, step: int = 2) -> list[Damage]:
    return list(verify(PosixStorage(root), f"step-{step:08d}").damages)


def restored(root: Path) -> int:
    """The step of the newest checkpoint that loads; what it loads is compared with what was saved."""
    storage = PosixStorage(root)
    for candidate in candidates(storage):
        if candidate.manifest is None:
            continue
        reader = TensorReader(storage, candidate.folder, candidate.manifest)
        try:
            found = {name: reader.read(name) for name in candidate.manifest.tensors}
        except DataError:
            continue
        assert found.keys() == truth(candidate.step).keys()
        assert all(np.array_equal(found[name], value) for name, value in truth(candidate.step).items())
        return candidate.step
    raise AssertionError("nothing can be restored")


FOLDER = "step-00000002"
LAST = 2 * STRIDE  # of writer 0

# file, first byte, number of bytes, extent, tensors, the step that is restored with a flipped bit there
REGIONS: dict[str, tuple[str, int, int, int | None, tuple[str, ...], int]] = {
    "first extent": ("data/0/0", 0, EXTENT_BYTES, 0, ("big",), 1),
    "second extent": ("data/0/0", STRIDE, 1 << 20, 1, ("big", "tail"), 1),
    "padding": ("data/0/0", STRIDE + (1 << 21), EXTENT_BYTES - (1 << 21), 1, ("big", "tail"), 1),
    "other writer": ("data/1/0", 0, 500, 0, ("own", "tail"), 1),
    "checksum of the first": ("data/0/0", EXTENT_BYTES, 4, 0, ("big",), 1),
    "checksum of the last": ("data/0/0", LAST - 4096, 4, 1, ("big", "tail"), 1),
    "index": ("data/0/0", LAST, 32, None, (), 1),
    "checksum of the index": ("data/0/0", LAST + 32, 4, None, (), 1),
    "record": ("data/1/zarr.json", 0, 700, None, (), 2),
    "outer group": ("zarr.json", 0, 150, None, (), 2),
    "inner group": ("data/zarr.json", 0, 40, None, (), 2),
    "manifest": ("manifest.json", 0, 500, None, (), 1),
}


@pytest.mark.parametrize("region", REGIONS)
@settings(max_examples=5)
@given(data=st.data())
def test_a_flipped_bit_is_named_and_never_loaded(region: str, pristine: Path, data: st.DataObject) -> None:
    path, first, count, extent, tensors, step = REGIONS[region]
    position = first + data.draw(st.integers(0, count - 1))
    with flipped(pristine / FOLDER / path, position, 1 << data.draw(st.integers(0, 7))):
        found = damages(pristine)
        assert [(damage.path, damage.extent, damage.tensors) for damage in found] == [
            (f"{FOLDER}/{path}", extent, tensors)
        ]
        assert found[0].writer == (
            int(path.split("/")[1]) if path.startswith("data/") and path[5].isdigit() else None
        )
        assert restored(pristine) == step


class flipped:
    """Bits of one byte of a file, for the time of a ``with`` block."""

    def __init__(self, path: Path, position: int, bits: int) -> None:
        self._path, self._position, self._bits = path, position, bits

    def __enter__(self) -> None:
        with self._path.open("r+b") as file:
            file.seek(self._position)
            (byte,) = file.read(1)
            file.seek(self._position)
            file.write(bytes([byte ^ self._bits]))

    def __exit__(self, *exc: object) -> None:
        self.__enter__()


def test_bytes_between_extents_are_nobodys(pristine: Path) -> None:
    with flipped(pristine / FOLDER / "data/0/0", EXTENT_BYTES + 4, 1):
        assert damages(pristine) == []
        assert restored(pristine) == 2


@settings(max_examples=8)
@given(cut=st.integers(1, LAST + 36), writer=st.sampled_from((0, 1)))
def test_a_truncated_blob_is_named_and_not_a_candidate(pristine: Path, cut: int, writer: int) -> None:
    path = pristine / FOLDER / f"data/{writer}/0"
    content = path.read_bytes()
    size = max(len(content) - cut, 0)
    with path.open("r+b") as file:
        file.truncate(size)
    try:
        found = damages(pristine)
        assert "another size" in found[0].message
        lost = sum(size < start * STRIDE + EXTENT_BYTES + 4 for start in range(len(content) // STRIDE))
        assert len([damage for damage in found if damage.extent is not None]) >= lost
        assert restored(pristine) == 1
    finally:
        path.write_bytes(content)


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def swap_extents(root: Path) -> None:
    """Two sound extents of one blob change places, with the checksums behind them."""
    path = root / FOLDER / "data/0/0"
    content = bytearray(path.read_bytes())
    content[:STRIDE], content[STRIDE:LAST] = content[STRIDE:LAST], content[:STRIDE]
    path.write_bytes(content)


def older(name: str) -> Callable[[Path], object]:
    """A file comes from the step before."""
    return lambda root: shutil.copy(root / "step-00000001" / name, root / FOLDER / name)


def make_longer(root: Path) -> None:
    with (root / FOLDER / "data/1/0").open("ab") as file:
        file.write(b"x")


def put_a_file_in_the_way(root: Path) -> None:
    shutil.rmtree(root / FOLDER / "data")
    (root / FOLDER / "data").touch()


SPOILT: dict[str, tuple[Callable[[Path], object], set[str], int]] = {
    "swapped extents": (swap_extents, {"data/0/0"}, 1),
    "swapped blobs": (
        lambda root: swap(root / FOLDER / "data/0/0", root / FOLDER / "data/1/0"),
        {"data/0/0", "data/1/0"},
        1,
    ),
    "swapped writers": (
        lambda root: swap(root / FOLDER / "data/0", root / FOLDER / "data/1"),
        {"data/0/0", "data/0/zarr.json", "data/1/0", "data/1/zarr.json"},
        1,
    ),
    "blob of another step": (older("data/0/0"), {"data/0/0"}, 1),
    "small blob of another step": (older("data/1/0"), {"data/1/0"}, 1),
    "record of another step": (older("data/1/zarr.json"), {"data/1/zarr.json"}, 2),
    "manifest of another step": (older("manifest.json"), {"manifest.json"}, 1),
    "group of another step": (older("zarr.json"), {"zarr.json"}, 2),
    "blob missing": (lambda root: (root / FOLDER / "data/1/0").unlink(), {"data/1/0"}, 1),
    "writer missing": (
        lambda root: shutil.rmtree(root / FOLDER / "data/1"),
        {"data/1/0", "data/1/zarr.json"},
        1,
    ),
    "manifest missing": (lambda root: (root / FOLDER / "manifest.json").unlink(), {"manifest.json"}, 1),
    "group missing": (lambda root: (root / FOLDER / "data/zarr.json").unlink(), {"data/zarr.json"}, 2),
    "longer blob": (make_longer, {"data/1/0"}, 1),
    "folder of another name": (
        lambda root: (root / "step-00000001").rename(root / "step-00000003"),
        set(),
        2,
    ),
    "file in the way": (
        put_a_file_in_the_way,
        {"data/zarr.json", "data/0/0", "data/0/zarr.json", "data/1/0", "data/1/zarr.json"},
        1,
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_does_not_belong_together_is_named_and_not_loaded(root: Path, name: str) -> None:
    spoil, paths, step = SPOILT[name]
    spoil(root)
    assert {damage.path for damage in damages(root)} == {f"{FOLDER}/{path}" for path in paths}
    assert restored(root) == step


def test_candidates_say_why_they_were_refused(root: Path) -> None:
    SPOILT["folder of another name"][0](root)
    SPOILT["longer blob"][0](root)
    found = list(candidates(PosixStorage(root)))
    assert [candidate.step for candidate in found] == [3, 2]
    assert "another step" in found[0].refused and "step 1" in found[0].refused
    assert "another size" in found[1].refused


def test_what_cannot_be_read_is_named_too(pristine: Path) -> None:
    with FAILPOINTS.armed("checkpoint.pread", OSError(errno.EIO, "broken"), offset=STRIDE):
        found = damages(pristine)
    assert [(damage.writer, damage.extent) for damage in found] == [(0, 1)]


def test_only_the_writers_asked_for_are_read(root: Path) -> None:
    shutil.rmtree(root / FOLDER / "data/1")
    report = verify(PosixStorage(root), FOLDER, writers=[0])
    assert report.is_good and report.num_extents == 2
    assert [c.step for c in candidates(PosixStorage(root), writers=[0]) if c.manifest] == [2, 1]


def test_progress_counts_all_that_is_read(pristine: Path) -> None:
    done: list[int] = []
    verify(PosixStorage(pristine), FOLDER, progress=done.append)
    assert sum(done) == 3 * EXTENT_BYTES


def test_the_tail_of_a_blob_is_what_these_tests_take_it_for() -> None:
    assert len(tail_of(2)) == 36
