"""Repair: what can be derived is, data comes from copies, and afterwards every byte is the one that was written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distrain.checkpoint.commit import begin
from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.layout import EXTENT_BYTES, STRIDE
from distrain.checkpoint.locate import locate, place
from distrain.checkpoint.repair import repair
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.checkpoint.verify import verify
from distrain.core.failpoints import FAILPOINTS
from distrain.core.protocols import ShardBox
from helpers.checkpoints import whole, write_checkpoint

FOLDER = "step-00000001"


@pytest.fixture
def storage(tmp_path: Path) -> PosixStorage:
    data = np.random.default_rng(0).integers(0, 256, EXTENT_BYTES + 5000, dtype=np.uint8)
    half = ShardBox(fqn="w", dtype="int32", global_shape=(8,), offset=(0,), shape=(4,))
    rest = ShardBox(fqn="w", dtype="int32", global_shape=(8,), offset=(4,), shape=(4,))
    four = np.arange(4, dtype=np.int32)
    empty = whole("empty", "float32", np.empty((0, 3), np.float32))
    ranks = [[whole("big", "uint8", data), (half, four), empty], [(rest, four)]]
    write_checkpoint(tmp_path / "run", ranks, objects={"config": {"lr": 0.1, "nan": float("nan")}})
    return PosixStorage(tmp_path / "run")


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


def overwrite(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def remove(root: Path, *names: str) -> None:
    for name in names:
        (root / name).unlink()


MENDABLE: dict[str, Callable[[Path], object]] = {
    "manifest gone": lambda root: remove(root, "manifest.json"),
    "manifest damaged": lambda root: overwrite(root / "manifest.json", 20, b"!"),
    "manifest and inner group": lambda root: remove(root, "manifest.json", "data/zarr.json"),
    "groups gone": lambda root: remove(root, "zarr.json", "data/zarr.json"),
    "records gone": lambda root: remove(root, "data/0/zarr.json", "data/1/zarr.json"),
    "record damaged": lambda root: overwrite(root / "data/0/zarr.json", 300, b"!"),
    "checksum behind an extent": lambda root: overwrite(root / "data/0/0", EXTENT_BYTES, b"1234"),
    "index": lambda root: overwrite(root / "data/0/0", 2 * STRIDE + 3, b"\xff"),
    "cut within the index": lambda root: cut(root / "data/1/0", STRIDE + 5),
}


@pytest.mark.parametrize("name", MENDABLE)
def test_what_follows_from_the_rest_is_written_again(storage: PosixStorage, name: str) -> None:
    root = Path(storage.name) / FOLDER
    before = contents(root)
    MENDABLE[name](root)
    assert not verify(storage, FOLDER).is_good
    done, report = repair(storage, FOLDER)
    assert done and report.is_good
    assert contents(root) == before


def test_a_manifest_without_time_and_mesh_is_mended_without_them(storage: PosixStorage) -> None:
    root = Path(storage.name) / FOLDER
    for name in ("manifest.json", "zarr.json"):
        (root / name).unlink()
    _, report = repair(storage, FOLDER)
    assert report.is_good
    assert locate(root).manifest.mesh == {}
    assert locate(root).manifest.object("config")


def test_data_comes_from_whichever_copy_has_it(storage: PosixStorage, tmp_path: Path) -> None:
    root = Path(storage.name) / FOLDER
    before = contents(root)
    copies = [Path(shutil.copytree(root, tmp_path / f"copy{i}/{FOLDER}")) for i in range(2)]
    overwrite(root / "data/0/0", 1000, b"spoilt")
    overwrite(root / "data/0/0", STRIDE + 1000, b"spoilt")
    overwrite(copies[0] / "data/0/0", 1000, b"spoilt")
    overwrite(copies[1] / "data/0/0", STRIDE + 1000, b"spoilt")
    shutil.rmtree(root / "data/1")
    places = [(PosixStorage(copy.parent), FOLDER) for copy in copies]
    _, report = repair(storage, FOLDER, copies=places[:1])
    assert {(damage.writer, damage.extent) for damage in report.damages} == {(0, 0), (0, 1)}
    _, report = repair(storage, FOLDER, copies=places)
    assert report.is_good
    assert contents(root) == before


def test_a_copy_of_another_checkpoint_mends_nothing(storage: PosixStorage, tmp_path: Path) -> None:
    data = np.zeros(EXTENT_BYTES + 5000, np.uint8)
    write_checkpoint(tmp_path / "other", [[whole("big", "uint8", data)]])
    root = Path(storage.name) / FOLDER
    overwrite(root / "data/0/0", 1000, b"spoilt")
    before = contents(root)
    done, report = repair(storage, FOLDER, copies=[(PosixStorage(tmp_path / "other"), FOLDER)])
    assert done == [] and not report.is_good
    assert contents(root) == before, "nothing is half mended"


def test_a_lost_manifest_comes_from_a_copy_only_if_that_is_of_the_same_save(
    storage: PosixStorage, tmp_path: Path
) -> None:
    root = Path(storage.name) / FOLDER
    shutil.copytree(root, tmp_path / "copy" / FOLDER)
    ranks = [[whole("a", "uint8", np.zeros(9, np.uint8))], [whole("b", "uint8", np.zeros(9, np.uint8))]]
    write_checkpoint(tmp_path / "other", ranks)
    before = contents(root)
    remove(root, "manifest.json", "data/1/zarr.json")
    with pytest.raises(DamageError, match=r"data/1/zarr\.json is missing"):
        repair(storage, FOLDER, copies=[(PosixStorage(tmp_path / "other"), FOLDER)])
    _, report = repair(storage, FOLDER, copies=[(PosixStorage(tmp_path / "copy"), FOLDER)])
    assert report.is_good
    assert contents(root) == before


def test_a_store_that_cannot_rename_is_mended_too(storage: PosixStorage, tmp_path: Path) -> None:
    root = Path(storage.name) / FOLDER
    before = contents(root)
    shutil.copytree(root, tmp_path / "copy" / FOLDER)
    overwrite(root / "data/0/0", 1000, b"spoilt")
    remove(root, "manifest.json")
    remote, folder = place(f"local://{root}")
    assert not remote.atomic_rename
    _, report = repair(remote, folder, copies=[place(tmp_path / "copy" / FOLDER)])
    assert report.is_good
    assert contents(root) == before


def test_a_good_checkpoint_is_left_alone(storage: PosixStorage) -> None:
    before = contents(Path(storage.name))
    assert repair(storage, FOLDER)[0] == []
    assert contents(Path(storage.name)) == before


def test_a_checkpoint_that_all_had_prepared_is_committed(tmp_path: Path) -> None:
    with FAILPOINTS.armed("checkpoint.manifest", InterruptedError()), pytest.raises(InterruptedError):
        write_checkpoint(tmp_path, [[whole("w", "float32", np.ones(3, np.float32))]], step=5)
    storage = PosixStorage(tmp_path)
    begin(storage, 6, "a0")
    with pytest.raises(DamageError, match="set of writers"):
        repair(storage, ".tmp-step-00000006-a0")
    done, report = repair(storage, ".tmp-step-00000005-a0")
    assert done == ["committed .tmp-step-00000005-a0 as step-00000005"] and report.is_good
    assert locate(tmp_path).manifest.step == 5


def test_with_neither_manifest_nor_records_there_is_nothing_to_begin_with(storage: PosixStorage) -> None:
    root = Path(storage.name) / FOLDER
    (root / "manifest.json").unlink()
    (root / "data/1/zarr.json").unlink()
    with pytest.raises(DamageError, match=r"data/1/zarr\.json is missing"):
        repair(storage, FOLDER)
