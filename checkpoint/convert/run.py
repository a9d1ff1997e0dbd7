"""From any format to any other: find out what is there, write it aside, and give it its name when it is whole."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from distrain.core.errors import ConfigError
from distrain.core.failpoints import hit
from distrain.core.vocabulary import ModelShape

from ..errors import storage_errors
from ..manifest import MANIFEST
from ..names import read_name
from ..untrusted import Json
from .dcp import METADATA, DcpSource, write_dcp
from .deepspeed import ZERO, UniversalSource, write_universal
from .form import Source, TensorInfo
from .hf import HuggingFaceSource, is_llama, write_hf
from .native import NativeSource, write_native
from .safetensors import SHARD_BYTES, SafetensorsSource, write_safetensors

FORMATS = ("distrain", "safetensors", "hf", "dcp", "deepspeed")

Progress = Callable[[int], object]
"""called with the bytes of each tensor that is done"""


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion has done."""

    path: Path
    """of the new checkpoint"""
    source_format: str
    num_tensors: int
    num_bytes: int
    left_out: tuple[str, ...]
    """what the source holds and the target does not"""


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str,
    shape: ModelShape | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda num_bytes: None,
) -> Converted:
    """Write the checkpoint at ``source``, of whatever format, to the new folder ``target`` in the format ``to``.

    For distrain, ``target`` is a root below which the step is committed. ``shape`` is that of the model, which hf
    needs; safetensors and hf begin a new file after ``shard_bytes``. Nothing appears under the target's name until
    all of it is durable; what a crash leaves behind is removed by the next attempt.

    Raises:
        ConfigError: there is nothing to read at ``source``, ``target`` exists, or ``to`` cannot hold it.
        DataError: the source is damaged, or a medium refuses.
    """
    if to not in FORMATS:
        raise ConfigError("no such format", got=to, allowed=", ".join(FORMATS))
    name, opened = open_source(Path(source))
    watched = _Watched(opened, progress)
    goal = Path(target).absolute()
    left_out: tuple[str, ...] = ()
    if to == "distrain":
        goal = write_native(watched, goal)
    else:
        with _aside(goal) as folder:
            if to == "safetensors":
                write_safetensors(watched, folder, shard_bytes=shard_bytes)
            elif to == "hf":
                left_out = write_hf(watched, folder, shape=shape, shard_bytes=shard_bytes)
            elif to == "dcp":
                write_dcp(watched, folder)
            else:
                left_out = write_universal(watched, folder)
    kept = [info for tensor, info in opened.tensors.items() if tensor not in left_out]
    all_left_out = tuple(dict.fromkeys((*opened.left_out, *left_out)))
    return Converted(goal, name, len(kept), sum(info.nbytes for info in kept), all_left_out)


def total_bytes(path: str | Path) -> int:
    """Bytes of all tensors of the checkpoint at ``path``: what ``progress`` adds up to."""
    return sum(info.nbytes for info in open_source(Path(path))[1].tensors.values())


def open_source(path: Path) -> tuple[str, Source]:
    """The format of the checkpoint at ``path`` and its content.

    Raises:
        ConfigError: it is of no known format.
    """
    if path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors"))):
        return ("hf", HuggingFaceSource(path)) if is_llama(path) else ("safetensors", SafetensorsSource(path))
    if (path / METADATA).is_file():
        return "dcp", DcpSource(path)
    if (path / ZERO).is_dir():
        return "deepspeed", UniversalSource(path)
    names = os.listdir(path) if path.is_dir() else []
    if MANIFEST in names or read_name(path.name) or any(map(read_name, names)):
        return "distrain", NativeSource(path)
    raise ConfigError(
        f"there is no checkpoint at {path}",
        got="a folder without one" if path.is_dir() else "no folder",
        allowed=f"a checkpoint of {', '.join(FORMATS)}",
    )


@dataclass(frozen=True, slots=True)
class _Watched:
    """A source that says how far its reader has come."""

    source: Source
    progress: Progress

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.source.tensors

    @property
    def objects(self) -> Mapping[str, Json]:
        return self.source.objects

    @property
    def left_out(self) -> tuple[str, ...]:
        return self.source.left_out

    @property
    def step(self) -> int:
        return self.source.step

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.source.read():
            hit("convert.tensor", name=name)
            yield name, tensor
            self.progress(tensor.nbytes)


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A new folder that becomes ``target`` at the end of the block, unless that raises."""
    if target.exists():
        raise ConfigError("the target exists", got=str(target), allowed="a new folder")
    temporary = target.parent / f".tmp-{target.name}"
    with storage_errors(f"create {temporary}"):
        temporary.mkdir(parents=True, exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(lock, temporary)
        _clear(temporary)
        try:
            yield temporary
            with storage_errors(f"write {target}"):
                hit("convert.sync", target=str(target))
                _sync_all(temporary)
                hit("convert.publish", target=str(target))
                temporary.rename(target)
                _sync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(folder: int, path: Path) -> None:
    """The kernel releases it when this process ends, however it does."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError("another conversion writes to the same target", got=str(path)) from None


def _clear(folder: Path) -> None:
    """Remove what an earlier attempt has left."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync_all(folder: Path) -> None:
    for root, folders, files in os.walk(folder):
        for name in (*files, *folders):
            _sync(Path(root, name))
    _sync(folder)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
