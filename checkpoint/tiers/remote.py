"""Checkpoints in an object store, or whatever else fsspec reaches.

Objects appear whole or not at all, cannot be changed and cannot be renamed in one go. So an upload is sent in parts
of some extents each, in order; extents that come early wait in memory. What counts is the manifest, written last
(``Storage.atomic_rename`` is False).
"""

import heapq
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from distrain.core.errors import MissingDependencyError
from distrain.core.failpoints import hit

from ..errors import DamageError, StorageError, storage_errors

PART_BYTES = 64 << 20


class RemoteStorage:
    """A prefix of a store, by its address: ``s3://bucket/run1``."""

    atomic_rename = False

    def __init__(self, url: str, *, options: dict[str, Any] | None = None) -> None:
        """``options`` go to fsspec. Raises MissingDependencyError without fsspec or the store's own package."""
        try:
            import fsspec  # type: ignore[import-untyped]

            self._store, root = fsspec.url_to_fs(url, **options or {})
        except (ImportError, ValueError) as cause:
            raise MissingDependencyError(
                f"{url} cannot be reached",
                got=str(cause),
                hint="pip install fsspec, and s3fs, gcsfs or adlfs",
            ) from None
        self.name = url
        self._root = str(root).rstrip("/")

    def _at(self, path: str) -> str:
        """The object's key; none leads out of the prefix."""
        parts = path.split("/") if path else []
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise ValueError(f"not a path below a checkpoint's root: {path!r}")
        return "/".join((self._root, *parts))

    def names(self, folder: str = "") -> Sequence[str]:
        """Names in ``folder``, sorted; none if there is no such folder."""
        with _errors(f"list {self.name}/{folder}"):
            self._store.invalidate_cache()
            try:
                found = self._store.ls(self._at(folder), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
            return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found})

    def read(self, path: str, *, limit_bytes: int) -> bytes | None:
        """The whole object, or None if there is none; DamageError if it is larger than ``limit_bytes``."""
        with _errors(f"read {self.name}/{path}"):
            try:
                self._store.invalidate_cache()
                size = self._store.size(self._at(path))
                if size is not None and size > limit_bytes:
                    raise DamageError(
                        f"{path} in {self.name} is too large",
                        got=f"{size} bytes",
                        allowed=f"up to {limit_bytes}",
                    )
                return bytes(self._store.cat_file(self._at(path)))
            except FileNotFoundError:
                return None

    def write(self, path: str, data: bytes) -> None:
        """Create or replace an object."""
        with _errors(f"write {self.name}/{path}"):
            hit("checkpoint.write", path=path)
            self._store.pipe_file(self._at(path), data)

    def sink(self, path: str, *, nbytes: int) -> "RemoteSink":
        """Begin to upload an object; its size need not be known."""
        return RemoteSink(self._store, self._at(path), what=f"{self.name}/{path}")

    def source(self, path: str) -> "RemoteSource":
        """Open an object for reading."""
        return RemoteSource(self._store, self._at(path), what=f"{self.name}/{path}")

    def make_folder(self, path: str) -> None:
        """Folders are prefixes of keys: there is nothing to make, except where the store is a file system after all."""
        with _errors(f"create {self.name}/{path}"):
            self._store.makedirs(self._at(path), exist_ok=True)

    def sync(self, folder: str = "") -> None:
        """An object that has been written is durable."""
        hit("checkpoint.sync", path=folder)

    def rename(self, old: str, new: str) -> None:
        """Nothing can be renamed at once."""
        raise ValueError(f"{self.name} cannot rename {old}")

    def remove(self, path: str) -> None:
        """Delete an object, or all below a prefix."""
        with _errors(f"delete {self.name}/{path}"):
            try:
                self._store.invalidate_cache()
                self._store.rm(self._at(path), recursive=True)
            except FileNotFoundError:
                return


class RemoteSink:
    """An upload: bytes go out in order, those that come early wait."""

    def __init__(self, store: Any, path: str, *, what: str) -> None:
        self._store, self._path, self._what = store, path, what
        self._is_finished = False
        self._lock = threading.Lock()
        self._early: list[tuple[int, bytes]] = []
        self._end = 0
        with _errors(f"write {what}"):
            self._file = store.open(path, "wb", block_size=PART_BYTES)

    def write(self, offset: int, data: memoryview) -> None:
        """Send ``data`` if it is its turn; a gap before it, that nobody will fill, is closed by ``finish``."""
        with self._lock, _errors(f"write {self._what}"):
            hit("checkpoint.pwrite", path=self._what, offset=offset)
            if offset != self._end:
                heapq.heappush(self._early, (offset, bytes(data)))
                return
            self._send(data)
            while self._early and self._early[0][0] == self._end:
                self._send(heapq.heappop(self._early)[1])

    def finish(self, *, nbytes: int) -> None:
        """End the upload at ``nbytes``: the object is there."""
        with self._lock, _errors(f"write {self._what}"):
            hit("checkpoint.fsync", path=self._what)
            while self._early:
                offset, data = heapq.heappop(self._early)
                self._fill(offset)
                self._send(data)
            self._fill(nbytes)
            self._file.close()
        self._is_finished = True

    def _fill(self, offset: int) -> None:
        """Zeros up to ``offset``: what was left out is a hole."""
        while self._end < offset:
            self._send(bytes(min(offset - self._end, PART_BYTES)))

    def _send(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._end += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_finished:
            # However the store takes it, nothing is to be left: an upload that is collected would be completed.
            for undo in (
                getattr(self._file, "discard", None),
                self._file.close,
                lambda: self._store.rm(self._path),
            ):
                with suppress(Exception):
                    undo() if undo else None


class RemoteSource:
    """An object being read, by ranges."""

    def __init__(self, store: Any, path: str, *, what: str) -> None:
        self._store, self._path, self._what = store, path, what
        with _errors(f"read {what}"):
            try:
                self.nbytes = int(store.size(path) or 0)
            except FileNotFoundError:
                raise DamageError(f"{what} is missing") from None

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset``."""
        with _errors(f"read {self._what}"):
            hit("checkpoint.pread", path=self._what, offset=offset)
            data = self._store.cat_file(self._path, start=offset, end=offset + len(buffer))
        if len(data) != len(buffer):
            raise DamageError(
                f"{self._what} is cut off",
                got=f"it ends at byte {offset + len(data)}",
                allowed=f"at least {offset + len(buffer)} bytes",
            )
        buffer[:] = data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    """Whatever a store's package raises becomes a StorageError."""
    try:
        with storage_errors(doing):
            yield
    except (StorageError, DamageError, ValueError):
        raise
    except Exception as cause:  # each package has errors of its own
        raise StorageError(doing, OSError(0, f"{type(cause).__name__}: {cause}")) from cause
