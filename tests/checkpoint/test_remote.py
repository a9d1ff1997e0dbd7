"""Checkpoints in an object store: everything appears whole or not at all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distrain.checkpoint.candidates import candidates
from distrain.checkpoint.collect import Retention, collect
from distrain.checkpoint.commit import commit, prepared
from distrain.checkpoint.errors import DamageError, StorageError
from distrain.checkpoint.flush import Flush, Identity, SlotMemory, Throttle
from distrain.checkpoint.layout import EXTENT_BYTES
from distrain.checkpoint.storage import Storage, aligned_memory
from distrain.checkpoint.tiers import open_storage
from distrain.core.errors import MissingDependencyError
from distrain.core.failpoints import FAILPOINTS
from helpers.keepers import layout_of

fsspec: Any = pytest.importorskip("fsspec")


@pytest.fixture(params=["memory", "local"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """A store in memory, and one on disk that is treated as one."""
    url = f"memory://{tmp_path.name}" if request.param == "memory" else f"local://{tmp_path}/root"
    storage = open_storage(url)
    storage.make_folder("folder")
    yield storage
    fsspec.filesystem("memory").store.clear()


def save(storage: Storage, step: int, *, nbytes: int = EXTENT_BYTES + 5) -> None:
    layout = layout_of(0, 1, nbytes=nbytes)
    memory = SlotMemory(aligned_memory(layout.slot_bytes), layout)
    memory.extent(0)[:8] = step.to_bytes(8, "little")
    identity = Identity(job="run", step=step, world_size=1, objects={})
    with Flush(storage, identity, memory, attempt="a0", throttle=Throttle(0)) as flush:
        for extent in reversed(range(layout.num_extents)):
            flush.write(extent)
        flush.finish()


def good(storage: Storage) -> list[int]:
    return [each.step for each in candidates(storage) if each.manifest]


def test_only_the_manifest_makes_a_checkpoint(storage: Storage) -> None:
    save(storage, 1)
    assert good(storage) == [] and set(prepared(storage, 1, "a0")) == {0}
    commit(storage, 1, "a0", mesh={})
    assert good(storage) == [1]


def test_retention_deletes_what_is_old(storage: Storage) -> None:
    for step in (1, 2, 3):
        save(storage, step)
        commit(storage, step, "a0", mesh={})
    collect(storage, Retention(keep_last=1))
    assert good(storage) == [3]
    assert not any("00000001" in name for name in storage.names())


def test_bytes_arrive_in_place_whatever_the_order_and_holes_are_zeros(storage: Storage) -> None:
    with storage.sink("folder/object", nbytes=40) as sink:
        sink.write(20, memoryview(b"late"))
        sink.write(0, memoryview(b"first"))
        sink.write(30, memoryview(b"last"))
        sink.finish(nbytes=40)
    with storage.source("folder/object") as source:
        buffer = bytearray(40)
        source.read(0, memoryview(buffer))
    assert buffer == b"first" + bytes(15) + b"late" + bytes(6) + b"last" + bytes(6)
    with storage.source("folder/object") as source, pytest.raises(DamageError, match="cut off"):
        source.read(30, memoryview(bytearray(20)))


def test_an_upload_that_is_left_leaves_nothing(storage: Storage) -> None:
    with storage.sink("folder/object", nbytes=4) as sink:
        sink.write(0, memoryview(b"half"))
    assert storage.read("folder/object", limit_bytes=10) is None


def test_what_is_not_there_is_none_and_what_is_too_large_is_refused(storage: Storage) -> None:
    assert storage.read("nothing", limit_bytes=10) is None and storage.names("nothing") == []
    storage.remove("nothing")
    storage.write("object", b"0123456789")
    assert storage.read("object", limit_bytes=10) == b"0123456789"
    with pytest.raises(DamageError, match="too large"):
        storage.read("object", limit_bytes=9)
    with pytest.raises(DamageError, match="missing"):
        storage.source("nothing")


@pytest.mark.parametrize("path", ["../up", "a//b", "a/./b", "/root", "a\0"])
def test_no_path_leads_out(storage: Storage, path: str) -> None:
    with pytest.raises(ValueError, match="not a path below"):
        storage.read(path, limit_bytes=1)


def test_what_the_store_raises_becomes_a_storage_error(storage: Storage) -> None:
    with (
        FAILPOINTS.armed("checkpoint.pwrite", RuntimeError("503 slow down")),
        pytest.raises(StorageError) as caught,
    ):
        save(storage, 1)
    assert "503 slow down" in str(caught.value)


def test_an_address_that_nobody_knows_is_explained() -> None:
    with pytest.raises(MissingDependencyError, match="cannot be reached"):
        open_storage("nosuchstore://bucket/run")
