"""A disk that loses power: what of a run of file operations is there afterwards.

POSIX promises of a file only what was fsynced, and of a name only what its folder's fsync covered. ``Journal`` stands
in for ``os`` and ``shutil`` in the one module that talks to the file system, does everything for real, and takes
notes; ``leave`` then builds the folder as it may look after a power cut behind any operation: whatever was not yet
durable may be there or not, each operation by itself.
"""

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

ROOT = 0


@dataclass(frozen=True, slots=True)
class Op:
    """A change of one node; durable once that node is synced afterwards. ``kind`` says which of the rest is used."""

    kind: str
    """sync, data, cut, link, unlink, rename"""
    node: int
    name: str = ""
    other: str = ""
    child: int = -1
    offset: int = 0
    data: bytes = b""


@dataclass
class _Node:
    is_file: bool
    names: dict[str, int] = field(default_factory=dict)
    content: list[int] = field(default_factory=list)
    """numbers of the operations that make it up"""


class Journal:
    """``os`` and ``shutil`` for files below ``base``, with notes."""

    def __init__(self, base: Path) -> None:
        self.ops: list[Op] = []
        self._nodes = {str(base): ROOT}
        self._files: set[int] = set()
        self._open: dict[int, int] = {}
        self._new = count(1)
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, *mode: int) -> int:
        with self._lock:
            fd = os.open(path, flags, *mode)
            if path not in self._nodes and flags & os.O_CREAT:
                self._link(path)
                self._files.add(self._nodes[path])
            if path in self._nodes:
                self._open[fd] = self._nodes[path]
                if flags & os.O_TRUNC:
                    self.ops.append(Op("cut", self._nodes[path]))
            return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        written = os.pwrite(fd, data, offset)
        with self._lock:
            self.ops.append(Op("data", self._open[fd], offset=offset, data=bytes(data[:written])))
        return written

    def ftruncate(self, fd: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes)
        self.ops.append(Op("cut", self._open[fd], offset=nbytes))

    def fsync(self, fd: int) -> None:
        """Noted, and not done: the notes are the disk."""
        self.ops.append(Op("sync", self._open[fd]))

    def makedirs(self, path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        with self._lock:
            for level in [*reversed(Path(path).parents), Path(path)]:
                if str(level) not in self._nodes and not level.is_dir():
                    level.mkdir()
                    self._link(str(level))

    def mkdir(self, path: str) -> None:
        with self._lock:
            os.mkdir(path)
            self._link(path)

    def rename(self, old: str, new: str) -> None:
        with self._lock:
            os.rename(old, new)
            (folder, before), (other, after) = os.path.split(old), os.path.split(new)
            assert folder == other, "renames across folders need two syncs: not in this model"
            node = self._nodes[old]
            moved = {
                path: node for path, node in self._nodes.items() if path == old or path.startswith(f"{old}/")
            }
            self._nodes = {path: node for path, node in self._nodes.items() if path not in moved}
            self._nodes |= {new + path.removeprefix(old): node for path, node in moved.items()}
            self.ops.append(Op("rename", self._nodes[folder], name=before, other=after, child=node))

    def unlink(self, path: str) -> None:
        with self._lock:
            os.unlink(path)
            folder, name = os.path.split(path)
            del self._nodes[path]
            self.ops.append(Op("unlink", self._nodes[folder], name=name))

    def rmtree(self, path: str) -> None:
        """``shutil.rmtree``, one name after the other."""
        for inner in sorted(Path(path).iterdir(), reverse=True):
            self.rmtree(str(inner)) if inner.is_dir() else self.unlink(str(inner))
        with self._lock:
            shutil.rmtree(path)
            folder, name = os.path.split(path)
            del self._nodes[path]
            self.ops.append(Op("unlink", self._nodes[folder], name=name))

    def _link(self, path: str) -> None:
        folder, name = os.path.split(path)
        node = self._nodes[path] = next(self._new)
        self.ops.append(Op("link", self._nodes[folder], name=name, child=node))

    def leave(self, target: Path, *, after: int, keeps: Callable[[int], bool]) -> str:
        """Build in ``target`` what may be there if power goes after so many operations.

        Of those that are not durable, the ones for whose number ``keeps`` holds have reached the disk. Returns a
        digest of the result; equal ones are built only once.
        """
        nodes = self._replay(after, keeps)
        found: list[tuple[Path, _Node]] = []

        def walk(node: _Node, path: Path) -> None:
            found.append((path, node))
            for name, child in sorted(node.names.items()):
                walk(nodes[child], path / name)

        walk(nodes[ROOT], Path())
        target /= f"{hash(tuple((path, *node.content) for path, node in found)):x}"
        if not target.exists():
            for path, node in found:
                if node.is_file:
                    self._write(target / path, node)
                else:
                    (target / path).mkdir(parents=True)
        return target.name

    def _write(self, path: Path, node: _Node) -> None:
        with path.open("wb") as file:
            for op in (self.ops[number] for number in node.content):
                if op.kind == "cut":
                    file.truncate(op.offset)
                else:
                    file.seek(op.offset)
                    file.write(op.data)

    def _replay(self, after: int, keeps: Callable[[int], bool]) -> dict[int, _Node]:
        synced: set[int] = set()
        durable = []
        for number in reversed(range(after)):
            op = self.ops[number]
            if op.kind == "sync":
                synced.add(op.node)
            elif op.node in synced or keeps(number):
                durable.append(number)
        nodes = {node: _Node(is_file=node in self._files) for node in (ROOT, *(op.child for op in self.ops))}
        for number in reversed(durable):
            op = self.ops[number]
            node = nodes[op.node]
            if op.kind in ("data", "cut"):
                node.content.append(number)
            if op.kind in ("unlink", "rename"):
                node.names.pop(op.name, None)
            if op.kind in ("link", "rename"):
                node.names[op.other or op.name] = op.child
        return nodes
