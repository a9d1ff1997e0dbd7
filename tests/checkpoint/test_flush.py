"""From a slot to a blob and on to the next tier."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.checkpoint.blob import BlobReader, sealed_crc
from distrain.checkpoint.commit import commit, prepared
from distrain.checkpoint.crc import crc32c
from distrain.checkpoint.errors import DamageError, StorageError
from distrain.checkpoint.flush import NICENESS, Flush, Identity, SlotMemory, Throttle, lower_priority, promote
from distrain.checkpoint.layout import EXTENT_BYTES, STRIDE, WriterLayout
from distrain.checkpoint.manifest import read_manifest
from distrain.checkpoint.storage import Storage, aligned_memory
from distrain.checkpoint.tiers import open_storage
from distrain.core.clock import FakeClock
from distrain.core.failpoints import FAILPOINTS
from helpers.keepers import layout_of, pattern

FREE = Throttle(0)
IDENTITY = Identity(job="run", step=3, world_size=1, objects={"loss": [1.5]})


def slot_of(layout: WriterLayout, *, dirt: int = 0) -> SlotMemory:
    """A slot that holds the pattern, and dirt where nothing was copied."""
    memory = aligned_memory(layout.slot_bytes)
    whole = np.frombuffer(memory, np.uint8)
    whole[:] = dirt
    data = pattern(3, 0, layout.nbytes)
    for extent in range(layout.num_extents):
        part = data[extent * EXTENT_BYTES : (extent + 1) * EXTENT_BYTES]
        whole[extent * STRIDE : extent * STRIDE + len(part)] = part
    return SlotMemory(memory, layout)


def written(storage: Storage, memory: SlotMemory, *, attempt: str = "a0") -> None:
    with Flush(storage, IDENTITY, memory, attempt=attempt, throttle=FREE) as flush:
        for extent in reversed(range(memory.layout.num_extents)):
            flush.write(extent)
        flush.finish()


def content(storage: Storage, folder: str) -> bytes:
    """The bytes of a checkpoint's only writer, verified."""
    (stored,) = read_manifest(storage, folder).writers
    buffer = aligned_memory(STRIDE)
    with BlobReader(storage, folder, writer=0, crcs=stored.crcs) as blob:
        return b"".join(bytes(blob.read(extent, buffer)) for extent in range(len(stored.crcs)))


@pytest.mark.parametrize("nbytes", [0, 1, 4097, EXTENT_BYTES, EXTENT_BYTES + 1])
def test_what_is_in_the_slot_is_prepared_and_committed(tmp_path: Path, nbytes: int) -> None:
    storage, layout = open_storage(str(tmp_path)), layout_of(0, 1, nbytes=nbytes)
    written(storage, slot_of(layout, dirt=0xAA))
    (record,) = prepared(storage, 3, "a0").values()
    assert record.objects == {"loss": [1.5]} and record.layout == layout
    folder = commit(storage, 3, "a0", mesh={})
    whole = content(storage, folder)
    assert whole[:nbytes] == pattern(3, 0, nbytes).tobytes() and not any(whole[nbytes:])


def test_a_sealed_extent_has_its_checksum_behind_it_and_zeros_where_nothing_was_copied() -> None:
    memory = slot_of(layout_of(0, 1, nbytes=1000), dirt=0xFF)
    extent = memory.sealed(0)
    assert not any(extent[1000:EXTENT_BYTES])
    assert sealed_crc(extent) == crc32c(extent[:EXTENT_BYTES]) == memory.crcs[0]


def test_extents_take_turns_in_a_slot_that_is_too_small() -> None:
    layout = layout_of(0, 1, nbytes=5 * EXTENT_BYTES)
    memory = SlotMemory(aligned_memory(2 * STRIDE), layout)
    assert memory.streams and memory.capacity == 2
    memory.extent(4)[:3] = b"abc"
    assert bytes(memory.extent(0)[:3]) == b"abc" and bytes(memory.extent(1)[:3]) == bytes(3)


def test_a_flush_that_is_left_prepares_nothing(tmp_path: Path) -> None:
    storage, memory = open_storage(str(tmp_path)), slot_of(layout_of(0, 1, nbytes=2 * EXTENT_BYTES))
    with Flush(storage, IDENTITY, memory, attempt="a0", throttle=FREE) as flush:
        flush.write(0)
        with pytest.raises(ValueError, match="not written"):
            flush.finish()
    assert prepared(storage, 3, "a0") == {}


def test_a_blob_is_promoted_as_it_is(tmp_path: Path) -> None:
    near, far = open_storage(str(tmp_path / "near")), open_storage(f"local://{tmp_path}/far")
    layout = layout_of(0, 1, nbytes=2 * EXTENT_BYTES + 9)
    written(near, slot_of(layout))
    folder = commit(near, 3, "a0", mesh={})
    record = promote(near, folder, far, writer=0, attempt="b1", throttle=FREE, go_on=lambda: True)
    assert record and record.attempt == "b1" and record.objects == {"loss": [1.5]}
    assert content(far, commit(far, 3, "b1", mesh={})) == content(near, folder)


def test_a_promotion_stops_when_told_to(tmp_path: Path) -> None:
    near, far = open_storage(str(tmp_path / "near")), open_storage(str(tmp_path / "far"))
    written(near, slot_of(layout_of(0, 1)))
    folder = commit(near, 3, "a0", mesh={})
    assert promote(near, folder, far, writer=0, attempt="b1", throttle=FREE, go_on=lambda: False) is None
    assert prepared(far, 3, "b1") == {}


def test_what_is_damaged_is_not_promoted(tmp_path: Path) -> None:
    near, far = open_storage(str(tmp_path / "near")), open_storage(str(tmp_path / "far"))
    written(near, slot_of(layout_of(0, 1)))
    folder = commit(near, 3, "a0", mesh={})
    with open(tmp_path / "near" / folder / "data" / "0" / "0", "r+b") as blob:
        blob.seek(100)
        blob.write(b"?")
    with pytest.raises(DamageError, match="extent 0"):
        promote(near, folder, far, writer=0, attempt="b1", throttle=FREE, go_on=lambda: True)


def test_a_throttle_lets_through_what_it_may_and_no_more() -> None:
    clock = FakeClock()
    throttle = Throttle(100.0, clock=clock)
    clock.advance(10)
    for _ in range(10):
        throttle.wait(100)
    assert clock.now_ns / 1e9 == pytest.approx(10 + 9)  # one second's worth had been saved up


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 30)), min_size=1, max_size=30))
def test_over_any_time_a_throttle_lets_through_its_rate_and_a_second_more(
    waits: list[tuple[int, int]],
) -> None:
    clock = FakeClock()
    throttle = Throttle(100.0, clock=clock)
    clock.advance(5)
    passed = 0
    for nbytes, pause in waits:
        throttle.wait(nbytes)
        passed += nbytes
        assert passed <= 100 * (clock.now_ns / 1e9 - 5) + 100 + 1e-6
        clock.advance(pause / 10)


def test_no_rate_is_no_limit() -> None:
    clock = FakeClock()
    Throttle(0, clock=clock).wait(1 << 60)
    assert clock.now_ns == 0


def test_a_flushing_thread_gives_way_to_others_and_only_that_thread() -> None:
    found: list[int] = []

    def work() -> None:
        lower_priority()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [max(before, NICENESS)] and os.getpriority(os.PRIO_PROCESS, 0) == before


@pytest.mark.parametrize(
    "point", ["checkpoint.begin", "checkpoint.pwrite", "checkpoint.fsync", "checkpoint.write"]
)
@pytest.mark.parametrize("url", ["", "local://"])
def test_an_error_of_any_medium_is_a_storage_error(tmp_path: Path, point: str, url: str) -> None:
    storage = open_storage(f"{url}{tmp_path}/root")
    with FAILPOINTS.armed(point, OSError(5, "broken")) as armed, pytest.raises((StorageError, OSError)):
        written(storage, slot_of(layout_of(0, 1)))
    assert armed.fired and prepared(storage, 3, "a0") == {}
