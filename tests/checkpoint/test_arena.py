"""Memory of snapshots: its size cannot change, and its headers are whole or nothing."""

import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.checkpoint import arena as arena_module
from distrain.checkpoint.arena import HEADER_BYTES, Arena, ArenaShape, SlotHeader, available_bytes
from distrain.checkpoint.layout import STRIDE
from distrain.core import shared_memory
from distrain.core.errors import ConfigError

SHAPE = ArenaShape(slot_bytes=STRIDE, num_slots=2)
HEADER = SlotHeader(
    job="run", step=7, writer=1, world_size=4, layout_digest="ab" * 16, objects_digest="cd" * 16, sums=None
)


@pytest.fixture
def arena() -> Iterator[Arena]:
    found = Arena.create(SHAPE)
    yield found
    found.close()


def test_a_slot_holds_nothing_until_it_is_labelled(arena: Arena) -> None:
    assert arena.header(0) is None and arena.header(1) is None
    arena.label(1, HEADER)
    assert arena.header(0) is None and arena.header(1) == HEADER
    arena.label(1, None)
    assert arena.header(1) is None


def test_another_process_that_gets_the_memory_reads_the_same_headers(arena: Arena) -> None:
    for step in range(5):
        arena.label(0, replace(HEADER, step=step, sums=step))
    other = Arena(SHAPE, os.dup(arena.fd))
    assert other.header(0) == replace(HEADER, step=4, sums=4)
    other.label(0, HEADER)
    assert arena.header(0) == HEADER
    other.close()


@given(data=st.data(), num_labels=st.integers(1, 4))
def test_a_torn_header_leaves_the_one_before(data: st.DataObject, num_labels: int) -> None:
    arena = Arena.create(SHAPE)
    with mmap.mmap(arena.fd, HEADER_BYTES) as memory:
        before = [memory[:HEADER_BYTES]]
        for step in range(num_labels):
            arena.label(0, replace(HEADER, step=step))
            before.append(memory[:HEADER_BYTES])
        old, new = before[-2:]
        changed = [i for i in range(HEADER_BYTES) if old[i] != new[i]]
        torn = data.draw(st.integers(1, len(changed) - 1))
        for i in changed[torn:]:  # the last write got only so far
            memory[i] = old[i]
    expected = replace(HEADER, step=num_labels - 2) if num_labels > 1 else None
    assert arena.header(0) == expected
    arena.label(0, HEADER)
    assert arena.header(0) == HEADER
    arena.close()


def test_a_header_of_rubbish_is_nothing(arena: Arena) -> None:
    with mmap.mmap(arena.fd, HEADER_BYTES) as memory:
        memory[:] = os.urandom(HEADER_BYTES)
    assert arena.header(0) is None


def test_memory_cannot_be_cut_off_under_those_who_have_it_mapped(arena: Arena) -> None:
    for size in (0, 2 * SHAPE.nbytes):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)


def test_what_is_not_such_memory_is_refused(tmp_path: Path) -> None:
    unsealed = os.memfd_create("other")
    os.ftruncate(unsealed, SHAPE.nbytes)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, SHAPE.nbytes)
    small = shared_memory.create(SHAPE.nbytes // 2)
    for fd in (unsealed, file, small):
        with pytest.raises(ConfigError, match="not the memory of a rank"):
            Arena(SHAPE, fd)
        with pytest.raises(OSError):
            os.fstat(fd)  # it was taken over, and closed


def test_memory_for_reading_cannot_be_written(arena: Arena) -> None:
    fd = shared_memory.read_only(arena.fd)
    with pytest.raises(PermissionError):
        shared_memory.Mapping(fd, nbytes=SHAPE.nbytes)
    mapped = shared_memory.Mapping(fd, nbytes=SHAPE.nbytes, writable=False)
    os.close(fd)
    arena.slot(0)[:5] = b"hello"
    assert bytes(mapped.view[arena.start(0) : arena.start(0) + 5]) == b"hello"
    mapped.close()


def test_allocated_memory_has_all_its_pages(arena: Arena) -> None:
    for index in range(SHAPE.num_slots):
        arena.allocate(index, lambda: True)
        assert os.fstat(arena.fd).st_blocks * 512 >= arena.start(index) + SHAPE.slot_bytes
    assert os.fstat(arena.fd).st_blocks * 512 >= SHAPE.nbytes


def test_allocation_stops_when_told_to(arena: Arena) -> None:
    arena.allocate(0, lambda: False)
    assert os.fstat(arena.fd).st_blocks * 512 < SHAPE.nbytes


@pytest.mark.parametrize(
    ("slot_bytes", "num_slots"),
    [(STRIDE, 0), (STRIDE, 65), (0, 1), (STRIDE + 1, 1), (-STRIDE, 1), (1 << 62, 1)],
)
def test_a_shape_that_cannot_be_is_refused(slot_bytes: int, num_slots: int) -> None:
    with pytest.raises(ConfigError, match="is wrong"):
        ArenaShape(slot_bytes=slot_bytes, num_slots=num_slots)


def test_a_limit_of_the_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "meminfo"
    info.write_text("MemTotal: 99999999 kB\nMemAvailable:   1000 kB\n")
    monkeypatch.setattr(arena_module, "MEMORY_INFO", info)
    monkeypatch.setattr(arena_module, "CGROUP", tmp_path)
    monkeypatch.setattr(arena_module, "OWN_GROUP", tmp_path / "own")
    assert available_bytes() == 1000 << 10
    (tmp_path / "own").write_text("0::/slurm/job\n")
    job = tmp_path / "slurm" / "job"
    job.mkdir(parents=True)
    for group, limit in ((tmp_path, "max"), (tmp_path / "slurm", "700000"), (job, "500000")):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text("100000\n")
    assert available_bytes() == 400000
    (tmp_path / "slurm" / "memory.current").write_text("600000\n")
    assert available_bytes() == 100000
    with pytest.raises(ConfigError, match="not enough memory"):
        Arena.create(SHAPE)
