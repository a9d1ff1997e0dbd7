"""A blob: what is written is read, by zarr and tensorstore too; through O_DIRECT or not; and disks may refuse."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from distrain.checkpoint.blob import BlobReader, BlobWriter, data_path, seal_extent
from distrain.checkpoint.errors import DamageError, StorageError
from distrain.checkpoint.layout import EXTENT_BYTES, STRIDE, WriterLayout, pack, segments
from distrain.checkpoint.record import WriterRecord
from distrain.checkpoint.storage import aligned_memory
from distrain.checkpoint.tiers import posix
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.core.failpoints import FAILPOINTS
from distrain.core.protocols import ShardBox

FOLDER = "step-00000001"


def layout_of(*sizes: int) -> WriterLayout:
    boxes = [
        ShardBox(fqn=f"t{i}", dtype="uint8", global_shape=(n,), offset=(0,), shape=(n,))
        for i, n in enumerate(sizes)
    ]
    return pack(0, boxes)


def slot_of(layout: WriterLayout, *, shift: int = 0) -> tuple[memoryview, NDArray[np.uint8]]:
    """A slot with random logical bytes, sealed, and those bytes; ``shift`` takes it off its page."""
    slot = aligned_memory(layout.slot_bytes + shift)[shift:]
    logical = np.random.default_rng(0).integers(0, 256, layout.nbytes, dtype=np.uint8)
    for position, start, length in segments(0, layout.nbytes):
        slot[position : position + length] = logical.data[start : start + length]
    for i in range(layout.num_extents):
        seal_extent(slot[i * STRIDE : (i + 1) * STRIDE])
    return slot, logical


def write(root: Path, layout: WriterLayout, slot: memoryview) -> WriterRecord:
    with BlobWriter(PosixStorage(root), FOLDER, layout) as blob:
        for i in reversed(range(layout.num_extents)):
            blob.write_extent(i, slot[i * STRIDE : (i + 1) * STRIDE])
        record = WriterRecord("run", 1, "a0", 0, 1, layout, blob.crcs, {})
        blob.finish(record)
    return record


def read(
    root: Path, record: WriterRecord, *, buffer_bytes: int = STRIDE, shift: int = 0
) -> NDArray[np.uint8]:
    buffer, parts = aligned_memory(buffer_bytes + shift)[shift:], []
    with BlobReader(PosixStorage(root), FOLDER, writer=0, crcs=record.crcs) as blob:
        for i in range(record.layout.num_extents):
            parts.append(np.frombuffer(blob.read(i, buffer), np.uint8).copy())
    return np.concatenate([np.empty(0, np.uint8), *parts])[: record.layout.nbytes]


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (EXTENT_BYTES,), (5000, EXTENT_BYTES + 3, 2 << 20)])
@pytest.mark.parametrize(("shift", "buffer_bytes"), [(0, STRIDE), (0, EXTENT_BYTES), (64, STRIDE)])
def test_what_is_written_is_read(
    tmp_path: Path, sizes: tuple[int, ...], shift: int, buffer_bytes: int
) -> None:
    layout = layout_of(*sizes)
    slot, logical = slot_of(layout, shift=shift)
    record = write(tmp_path, layout, slot)
    assert np.array_equal(read(tmp_path, record, buffer_bytes=buffer_bytes, shift=shift), logical)


def test_padding_takes_no_space_on_the_disk(tmp_path: Path) -> None:
    layout = layout_of(10_000)
    write(tmp_path, layout, slot_of(layout)[0])
    assert (tmp_path / data_path(FOLDER, 0)).stat().st_blocks * 512 < 100_000


def test_rubbish_behind_the_last_byte_is_part_of_what_is_checked(tmp_path: Path) -> None:
    layout = layout_of(10_000)
    slot, logical = slot_of(layout)
    slot[EXTENT_BYTES - 5] = 77
    seal_extent(slot)
    assert np.array_equal(read(tmp_path, write(tmp_path, layout, slot)), logical)


@pytest.mark.parametrize("sizes", [(), (1,), (5000, EXTENT_BYTES + 3)])
def test_zarr_reads_a_blob_as_an_array_of_bytes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    zarr = pytest.importorskip("zarr")
    layout = layout_of(*sizes)
    slot, logical = slot_of(layout)
    write(tmp_path, layout, slot)
    array = zarr.open_array(tmp_path / FOLDER / "data/0", mode="r")
    assert np.array_equal(array[:], logical)
    assert array.attrs["distrain"]["step"] == 1


def open_tensorstore(root: Path) -> Any:
    tensorstore = pytest.importorskip("tensorstore")
    kvstore = {"driver": "file", "path": str(root / FOLDER / "data/0")}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()


@pytest.mark.parametrize("sizes", [(), (1,), (5000, EXTENT_BYTES + 3)])
def test_tensorstore_reads_a_blob_as_an_array_of_bytes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    layout = layout_of(*sizes)
    slot, logical = slot_of(layout)
    write(tmp_path, layout, slot)
    assert np.array_equal(open_tensorstore(tmp_path).read().result(), logical)


def test_zarr_and_tensorstore_find_a_flipped_bit_by_our_checksums(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    layout = layout_of(5000, EXTENT_BYTES + 3)
    write(tmp_path, layout, slot_of(layout)[0])
    with (tmp_path / data_path(FOLDER, 0)).open("r+b") as file:
        file.seek(STRIDE + 17)
        byte = file.read(1)
        file.seek(STRIDE + 17)
        file.write(bytes([byte[0] ^ 4]))
    array = zarr.open_array(tmp_path / FOLDER / "data/0", mode="r")
    assert array[:100].size == 100
    with pytest.raises(ValueError, match="checksum"):
        array[EXTENT_BYTES + 10 : EXTENT_BYTES + 20]
    with pytest.raises(ValueError, match="Digest mismatch"):
        open_tensorstore(tmp_path)[EXTENT_BYTES + 10 : EXTENT_BYTES + 20].read().result()


def test_extents_that_were_not_written_cannot_be_recorded(tmp_path: Path) -> None:
    layout = layout_of(EXTENT_BYTES + 1)
    slot, _ = slot_of(layout)
    with BlobWriter(PosixStorage(tmp_path), FOLDER, layout) as blob:
        blob.write_extent(0, slot[:STRIDE])
        with pytest.raises(ValueError, match=r"\[1\] were not written"):
            _ = blob.crcs
        with pytest.raises(ValueError):
            blob.finish(WriterRecord("run", 1, "a0", 0, 1, layout, (0, 0), {}))


def test_a_writer_that_begins_again_withdraws_its_record_first(tmp_path: Path) -> None:
    layout = layout_of(100)
    slot, _ = slot_of(layout)
    write(tmp_path, layout, slot)
    with BlobWriter(PosixStorage(tmp_path), FOLDER, layout):
        assert not (tmp_path / FOLDER / "data/0/zarr.json").exists()


class Disk(SimpleNamespace):
    """``os`` with some calls replaced, for the one module that talks to the file system."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def no_direct(path: str, flags: int, *mode: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "no O_DIRECT here")
    return os.open(path, flags, *mode)


def short_pwrite(fd: int, data: memoryview, offset: int) -> int:
    return os.pwrite(fd, data[: max(1, min(len(data), 1_000_000))], offset)


def page_pwrite(fd: int, data: memoryview, offset: int) -> int:
    return os.pwrite(fd, data[: min(len(data), 4096 * 1000)], offset)


def short_preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
    return os.preadv(fd, [buffers[0][:4_000_000]], offset)


def no_direct_pwrite(fd: int, data: memoryview, offset: int) -> int:
    """A file system that opens with O_DIRECT and refuses to write so."""
    import fcntl

    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        raise OSError(errno.EINVAL, "not that way")
    return os.pwrite(fd, data, offset)


@pytest.mark.parametrize(
    "replaced",
    [
        {"open": no_direct},
        {"pwrite": short_pwrite},
        {"pwrite": page_pwrite},
        {"pwrite": no_direct_pwrite},
        {"preadv": short_preadv},
    ],
    ids=["no O_DIRECT", "short writes", "short writes of whole pages", "EINVAL when writing", "short reads"],
)
def test_file_systems_that_do_less_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: dict[str, Callable[..., Any]]
) -> None:
    monkeypatch.setattr(posix, "os", Disk(**replaced))
    layout = layout_of(5000, EXTENT_BYTES + 3)
    slot, logical = slot_of(layout)
    assert np.array_equal(read(tmp_path, write(tmp_path, layout, slot)), logical)


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS], ids=errno.errorcode.get
)
@pytest.mark.parametrize(
    "point", ["checkpoint.pwrite", "checkpoint.fsync", "checkpoint.write", "checkpoint.sync"]
)
def test_what_the_disk_refuses_is_named(tmp_path: Path, point: str, code: int) -> None:
    layout = layout_of(5000)
    slot, _ = slot_of(layout)
    with (
        FAILPOINTS.armed(point, OSError(code, os.strerror(code))),
        pytest.raises(StorageError, match=errno.errorcode[code]) as caught,
    ):
        write(tmp_path, layout, slot)
    assert caught.value.errno == code
    assert str(tmp_path) in str(caught.value)


FULL_DISK = """
import subprocess, sys
from pathlib import Path

root = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", root], check=True)
from distrain.checkpoint.blob import BlobWriter
from distrain.checkpoint.errors import StorageError
from distrain.checkpoint.layout import pack
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.core.protocols import ShardBox

box = ShardBox(fqn="t", dtype="uint8", global_shape=(9 << 20,), offset=(0,), shape=(9 << 20,))
try:
    BlobWriter(PosixStorage(root), "step-00000001", pack(0, [box]))
except StorageError as error:
    print(error)
print(sum(path.stat().st_blocks for path in root.rglob("0")))
"""


@pytest.mark.processes
def test_a_disk_too_small_for_a_blob_says_so_before_anything_is_written(tmp_path: Path) -> None:
    unshare = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs user namespaces, for a file system of its own")
    command = [*unshare, sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.stdout.splitlines()[1:] == [
        "got: ENOSPC: No space left on device",
        "try: free space, or keep fewer checkpoints",
        "0",
    ], done.stderr


def test_a_missing_blob_and_a_link_are_refused(tmp_path: Path) -> None:
    layout = layout_of(100)
    record = write(tmp_path, layout, slot_of(layout)[0])
    path = tmp_path / data_path(FOLDER, 0)
    moved = path.rename(tmp_path / "elsewhere")
    with pytest.raises(DamageError, match="is missing"):
        read(tmp_path, record)
    path.symlink_to(moved)
    with pytest.raises(StorageError, match="ELOOP"):
        read(tmp_path, record)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", "a/../../b", "a/.", "a\0b"])
def test_no_path_leads_out_of_the_root(tmp_path: Path, path: str) -> None:
    storage = PosixStorage(tmp_path / "root")
    for operation in (storage.names, storage.make_folder, storage.remove, storage.sync, storage.source):
        with pytest.raises(ValueError, match="not a path below"):
            operation(path)


def test_files_of_state_are_for_their_owner_only(tmp_path: Path) -> None:
    layout = layout_of(100)
    write(tmp_path, layout, slot_of(layout)[0])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
