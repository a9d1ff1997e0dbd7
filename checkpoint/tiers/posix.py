"""Checkpoints in a folder of a file system.

Bulk data goes past the page cache with O_DIRECT: fresh pages of the cache cost more than the disk. Where the file
system knows no O_DIRECT, or memory is not aligned, it goes through the cache and is dropped from there afterwards.
"""

import ctypes
import errno
import mmap
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from distrain.core.failpoints import hit

from ..errors import DamageError, storage_errors

_PAGE = mmap.PAGESIZE
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)  # what open and write say where the file system has no O_DIRECT


class PosixStorage:
    """The folder ``root``, which need not exist yet."""

    atomic_rename = True

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).absolute()

    @property
    def name(self) -> str:
        """The path."""
        return str(self._root)

    def _at(self, path: str) -> str:
        """The path in the file system; none leads out of the root."""
        parts = path.split("/") if path else []
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise ValueError(f"not a path below a checkpoint's root: {path!r}")
        return str(self._root.joinpath(*parts))

    def names(self, folder: str = "") -> Sequence[str]:
        """Names in ``folder``, sorted; none if there is no such folder."""
        with storage_errors(f"list {self._at(folder)}"):
            try:
                return sorted(os.listdir(self._at(folder)))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def read(self, path: str, *, limit_bytes: int) -> bytes | None:
        """The whole file, or None if there is none; DamageError if it is larger than ``limit_bytes``."""
        with storage_errors(f"read {self._at(path)}"):
            try:
                fd = os.open(self._at(path), os.O_RDONLY | os.O_NOFOLLOW)
            except (FileNotFoundError, NotADirectoryError):
                return None
            with os.fdopen(fd, "rb") as file:
                size = os.fstat(fd).st_size
                if size > limit_bytes:
                    raise DamageError(
                        f"{path} in {self.name} is too large",
                        got=f"{size} bytes",
                        allowed=f"up to {limit_bytes}",
                    )
                return file.read(limit_bytes)

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a file at once, with durable content."""
        target = self._at(path)
        temporary = f"{target}.tmp"
        with storage_errors(f"write {target}"):
            hit("checkpoint.write", path=path)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            try:
                _write_all(fd, memoryview(data), 0)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, target)

    def sink(self, path: str, *, nbytes: int) -> "PosixSink":
        """Begin to write a file of about ``nbytes``, for which space is reserved."""
        return PosixSink(self._at(path), nbytes=nbytes)

    def source(self, path: str) -> "PosixSource":
        """Open a file for reading."""
        return PosixSource(self._at(path))

    def make_folder(self, path: str) -> None:
        """Create a folder and those above it; what is new outside of the root is made durable at once."""
        with storage_errors(f"create {self._at(path)}"):
            outside = (self._root, *self._root.parents)
            new = [folder for folder in outside if not os.path.isdir(folder)]
            os.makedirs(self._at(path), exist_ok=True)
            for folder in new:
                _sync_folder(str(folder.parent))

    def sync(self, folder: str = "") -> None:
        """fsync a folder."""
        with storage_errors(f"fsync {self._at(folder)}"):
            hit("checkpoint.sync", path=folder)
            _sync_folder(self._at(folder))

    def rename(self, old: str, new: str) -> None:
        """Rename a folder to a name that does not exist, or a file, which may replace another."""
        with storage_errors(f"rename {self._at(old)} to {new}"):
            hit("checkpoint.rename", old=old, new=new)
            os.rename(self._at(old), self._at(new))

    def remove(self, path: str) -> None:
        """Delete a file, or a folder and all below it."""
        target = self._at(path)
        with storage_errors(f"delete {target}"):
            try:
                shutil.rmtree(target) if _is_folder(target) else os.unlink(target)
            except FileNotFoundError:
                return


class PosixSink:
    """A file being written, at several offsets at once if need be."""

    def __init__(self, path: str, *, nbytes: int) -> None:
        self._path, self._direct = path, -1
        with storage_errors(f"write {path}"):
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
            self._fd = os.open(path, flags | os.O_TRUNC, 0o600)
            try:
                self._direct = _open_direct(path, flags)
                _reserve(self._fd, nbytes)
            except BaseException:
                self._close()
                raise

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data``: past the page cache if it, its address and ``offset`` are whole pages."""
        with storage_errors(f"write {self._path}"):
            hit("checkpoint.pwrite", path=self._path, offset=offset)
            done = 0
            if self._direct >= 0 and _is_aligned(data, offset):
                done = _write_direct(self._direct, data, offset)
            if done < len(data):
                _write_all(self._fd, data[done:], offset + done)

    def finish(self, *, nbytes: int) -> None:
        """Cut, fsync and close."""
        with storage_errors(f"write {self._path}"):
            hit("checkpoint.fsync", path=self._path)
            os.ftruncate(self._fd, nbytes)
            os.fsync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self._close()

    def _close(self) -> None:
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


class PosixSource:
    """A file being read."""

    def __init__(self, path: str) -> None:
        self._path, self._direct = path, -1
        with storage_errors(f"read {path}"):
            try:
                self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            except (FileNotFoundError, NotADirectoryError):
                raise DamageError(f"{path} is missing") from None
            self._direct = _open_direct(path, os.O_RDONLY | os.O_NOFOLLOW)
            self.nbytes = os.fstat(self._fd).st_size

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``: past the page cache if it, its address and ``offset`` are whole pages."""
        with storage_errors(f"read {self._path}"):
            hit("checkpoint.pread", path=self._path, offset=offset)
            done = 0
            if self._direct >= 0 and _is_aligned(buffer, offset):
                done = _read_direct(self._direct, buffer, offset)
            while done < len(buffer):
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
                if count == 0:
                    raise DamageError(
                        f"{self._path} is cut off",
                        got=f"it ends at byte {offset + done}",
                        allowed=f"at least {offset + len(buffer)} bytes",
                    )
                done += count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_folder(path: str) -> bool:
    """A link to a folder is none: what it leads to is not ours to delete."""
    return os.path.isdir(path) and not os.path.islink(path)


def _open_direct(path: str, flags: int) -> int:
    """A descriptor with O_DIRECT, or -1 where there is no such thing."""
    if not _O_DIRECT:
        return -1
    try:
        hit("checkpoint.open_direct", path=path)
        return os.open(path, flags | _O_DIRECT)
    except OSError as error:
        if error.errno in _NO_DIRECT:
            return -1
        raise


def _reserve(fd: int, nbytes: int) -> None:
    """Allocate blocks, so that a full disk shows at once and writing is faster; not every file system can.

    Not ``os.posix_fallocate``: where a file system cannot, that writes every block.
    """
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if allocate is None or not nbytes:
        return
    allocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if allocate(fd, 0, 0, nbytes) and ctypes.get_errno() in _FULL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _is_aligned(data: memoryview, offset: int) -> bool:
    address = int(np.frombuffer(data, np.uint8).ctypes.data) if len(data) else 1
    return not (address % _PAGE or offset % _PAGE or len(data) % _PAGE)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def _write_direct(fd: int, data: memoryview, offset: int) -> int:
    """Bytes written; what is left after a short write that ends inside a page is not this function's."""
    done = 0
    while done < len(data) and done % _PAGE == 0:
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            if error.errno in _NO_DIRECT:
                break
            raise
    return done


def _read_direct(fd: int, buffer: memoryview, offset: int) -> int:
    """Bytes read, up to the last page of the file at the least."""
    done = 0
    while done < len(buffer) and done % _PAGE == 0:
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            if error.errno in _NO_DIRECT:
                break
            raise
        if count == 0:
            break
        done += count
    return done
