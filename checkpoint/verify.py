"""Reads every byte of a checkpoint and names all that is damaged: which writer, which extent, which tensors.

Goes on after the first finding, because what is lost decides what can be done about it (``repair.py``).
"""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import local

from distrain.core.errors import DataError

from .blob import check_ends, data_path, read_extent
from .commit import descriptions, read_record
from .layout import EXTENT_BYTES, STRIDE
from .manifest import MANIFEST, Manifest, StoredWriter, read_manifest
from .names import read_name
from .storage import Source, Storage, aligned_memory
from .untrusted import LARGEST, refuse


@dataclass(frozen=True, slots=True)
class Damage:
    """One finding."""

    path: str
    """below the storage's root"""
    message: str
    writer: int | None = None
    extent: int | None = None
    tensors: tuple[str, ...] = ()
    """those with bytes in what is damaged"""


@dataclass(frozen=True, slots=True)
class Report:
    """What ``verify`` found."""

    folder: str
    num_extents: int
    """that were read"""
    damages: tuple[Damage, ...]

    @property
    def is_good(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages


def verify(
    storage: Storage,
    folder: str,
    *,
    writers: Collection[int] | None = None,
    num_threads: int = 2,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> Report:
    """Read all of the checkpoint in ``folder``; only those ``writers`` if given.

    ``progress`` is called from several threads with the bytes of each extent that was read.
    """
    try:
        manifest = manifest_named(storage, folder)
    except DataError as error:
        return Report(folder, 0, (Damage(f"{folder}/{MANIFEST}", str(error)),))
    chosen = [w for w in manifest.writers if writers is None or w.writer in writers]
    findings = [*_descriptions(storage, folder, manifest)]
    for writer in chosen:
        findings += _verify_writer(storage, folder, manifest, writer, num_threads, progress)
    return Report(folder, sum(len(writer.crcs) for writer in chosen), tuple(findings))


def manifest_named(storage: Storage, folder: str) -> Manifest:
    """The manifest of ``folder``, which is of the step that the folder's name says; otherwise DamageError."""
    manifest = read_manifest(storage, folder)
    name = read_name(folder)
    if name is not None and name.step != manifest.step:
        refuse(f"{folder}/{MANIFEST}: step", manifest.step, f"{name.step}, as the folder's name says")
    return manifest


def _descriptions(storage: Storage, folder: str, manifest: Manifest) -> Iterator[Damage]:
    for path, document in descriptions(folder, manifest).items():
        try:
            found = storage.read(path, limit_bytes=2 * len(document))
        except DataError as error:
            yield Damage(path, str(error))
            continue
        if found != document:
            yield Damage(path, f"error: {path} is {'missing' if found is None else 'damaged'}")


def _verify_writer(
    storage: Storage,
    folder: str,
    manifest: Manifest,
    writer: StoredWriter,
    num_threads: int,
    progress: Callable[[int], object],
) -> list[Damage]:
    findings = []
    try:
        record = read_record(storage, folder, writer.writer)
        if record.digest != writer.record_digest:
            refuse("the record", record.digest, f"{writer.record_digest}, as the manifest says")
    except DataError as error:
        findings.append(Damage(f"{folder}/data/{writer.writer}/zarr.json", str(error), writer.writer))
    path = data_path(folder, writer.writer)
    try:
        with storage.source(path) as source:
            try:
                check_ends(source, len(writer.crcs), what=path)
            except DataError as error:
                findings.append(Damage(path, str(error), writer.writer))
            broken = _broken_extents(source, writer, path, num_threads, progress)
    except DataError as error:  # no file at all
        findings.append(Damage(path, str(error), writer.writer, tensors=tensors_of(manifest, writer.writer)))
        return findings
    for extent, message in broken:
        names = tensors_of(manifest, writer.writer, extent=extent)
        findings.append(Damage(path, message, writer.writer, extent, names))
    return findings


def _broken_extents(
    source: Source, writer: StoredWriter, path: str, num_threads: int, progress: Callable[[int], object]
) -> list[tuple[int, str]]:
    memory = local()

    def broken(extent: int) -> str:
        if not hasattr(memory, "buffer"):
            memory.buffer = aligned_memory(STRIDE)
        try:
            read_extent(source, extent, memory.buffer, crc=writer.crcs[extent], what=path)
        except DataError as error:
            return str(error)
        finally:
            progress(EXTENT_BYTES)
        return ""

    with ThreadPoolExecutor(num_threads, thread_name_prefix="verify") as pool:
        messages = list(pool.map(broken, range(len(writer.crcs))))
    return [(extent, message) for extent, message in enumerate(messages) if message]


def tensors_of(manifest: Manifest, writer: int, *, extent: int | None = None) -> tuple[str, ...]:
    """Names of the tensors with bytes in the blob of ``writer``, or in one extent of it."""
    first, end = (0, LARGEST) if extent is None else (extent * EXTENT_BYTES, (extent + 1) * EXTENT_BYTES)
    return tuple(
        fqn
        for fqn, tensor in manifest.tensors.items()
        if any(
            box.writer == writer
            and box.nbytes
            and box.byte_offset < end
            and first < box.byte_offset + box.nbytes
            for box in tensor.boxes
        )
    )
