"""Mends what can be mended with certainty, so that every byte is again the one that was written.

Most of a checkpoint can be derived from the rest of it: the manifest from the records, a record from the manifest,
indices and checksums from either. Data comes back from another copy of the same checkpoint, on another tier. Nothing is
guessed: what is put back matches a checksum that was taken when it was written. A file is replaced at once, so a crash
leaves it as it was.
"""

import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress

from distrain.core.errors import DataError
from distrain.core.protocols import ShardBox

from .blob import data_path, read_extent, record_path, tail_of
from .commit import commit, descriptions, read_record
from .errors import DamageError
from .layout import EXTENT_BYTES, STRIDE, Piece, WriterLayout
from .manifest import MANIFEST, Manifest, StoredWriter, manifest_document, manifest_of
from .names import Kind, read_name
from .record import CRC_BYTES, RECORD_LIMIT_BYTES, WriterRecord, record_document
from .storage import Source, Storage, aligned_memory
from .untrusted import Json, number, parse, table
from .verify import Report, manifest_named, verify

Copy = tuple[Storage, str]
"""a storage and a folder in it"""


def repair(
    storage: Storage,
    folder: str,
    *,
    copies: Sequence[Copy] = (),
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> tuple[list[str], Report]:
    """Mend the checkpoint in ``folder``, taking data from ``copies`` of it; returns what was done and what is left.

    A temporary folder in which all writers have prepared is committed.

    Raises:
        DataError: there is too little to begin with: no manifest, and not all records.
    """
    name = read_name(folder)
    if name is not None and name.kind is Kind.TEMPORARY:
        final = commit(storage, name.step, name.attempt, mesh={})
        return [f"committed {folder} as {final}"], verify(storage, final, progress=progress)
    done = []
    try:
        manifest = manifest_named(storage, folder)
    except DataError:
        manifest = _manifest_again(storage, folder, copies)
        storage.write(f"{folder}/{MANIFEST}", manifest_document(manifest))
        done.append(f"wrote {folder}/{MANIFEST} again")
    found = verify(storage, folder, progress=progress)
    if found.is_good and not done:
        return [], found
    done += _small_files(storage, folder, manifest, {damage.path for damage in found.damages})
    for writer in manifest.writers:
        path = data_path(folder, writer.writer)
        if any(damage.path == path for damage in found.damages):
            with suppress(DataError):  # the report that follows says what is still damaged
                _blob(storage, folder, writer, copies)
                done.append(f"wrote {path} again")
    for changed in (f"{folder}/data", folder):
        storage.sync(changed)
    return done, verify(storage, folder, progress=progress)


def _manifest_again(storage: Storage, folder: str, copies: Sequence[Copy]) -> Manifest:
    """The manifest from the records, or from a copy that has the same records where some are lost."""
    writers = [int(name) for name in storage.names(f"{folder}/data") if name.isascii() and name.isdecimal()]
    records, lost = [], None
    for writer in writers:
        try:
            records.append(read_record(storage, folder, writer))
        except DataError as error:
            lost = error
    for copy, where in copies if lost else ():
        with suppress(DataError):
            manifest = manifest_named(copy, where)
            stored = {writer.writer: writer.record_digest for writer in manifest.writers}
            if records and all(stored.get(record.writer) == record.digest for record in records):
                return manifest
    if lost:
        raise lost
    created, mesh = _head(storage, folder)
    return manifest_of(records, created=created, mesh=mesh)


def _head(storage: Storage, folder: str) -> tuple[float, Mapping[str, Json]]:
    """Time and mesh, which only the group's description has; now and nothing if it is lost too."""
    path = f"{folder}/zarr.json"
    with suppress(DataError):
        data = storage.read(path, limit_bytes=RECORD_LIMIT_BYTES) or b""
        attributes = table(table(parse(data, path), path).get("attributes"), path)
        head = table(attributes.get("distrain"), path)
        return number(head.get("created"), path), table(head.get("mesh"), path)
    return time.time(), {}


def _small_files(storage: Storage, folder: str, manifest: Manifest, damaged: set[str]) -> Iterator[str]:
    again = dict(descriptions(folder, manifest))
    for writer in manifest.writers:
        record = record_from(manifest, writer)
        if record.digest == writer.record_digest:
            again[record_path(folder, writer.writer)] = record_document(record)
    for path, document in again.items():
        if path in damaged:
            storage.make_folder(path.rpartition("/")[0])
            storage.write(path, document)
            yield f"wrote {path} again"


def record_from(manifest: Manifest, writer: StoredWriter) -> WriterRecord:
    """What a writer must have recorded, from the manifest; it is that if the digest agrees."""
    pieces = []
    for fqn, tensor in manifest.tensors.items():
        for stored in tensor.boxes:
            if stored.writer == writer.writer:
                box = ShardBox(
                    fqn=fqn,
                    dtype=tensor.dtype,
                    global_shape=tensor.global_shape,
                    offset=stored.offset,
                    shape=stored.shape,
                )
                pieces.append(Piece(box, stored.byte_offset, stored.nbytes))
    pieces.sort(key=lambda piece: (piece.offset, piece.nbytes))
    return WriterRecord(
        job=manifest.job,
        step=manifest.step,
        attempt=manifest.attempt,
        writer=writer.writer,
        world_size=manifest.world_size,
        layout=WriterLayout(writer.writer, tuple(pieces), writer.nbytes),
        crcs=writer.crcs,
        objects={
            name: entry.value
            for name, entries in manifest.objects.items()
            for entry in entries
            if writer.writer in entry.writers
        },
    )


def _blob(storage: Storage, folder: str, writer: StoredWriter, copies: Sequence[Copy]) -> None:
    """Write the blob of ``writer`` anew, each extent from the first copy that has it, and put it into place."""
    path, end = data_path(folder, writer.writer), len(writer.crcs) * STRIDE
    buffer, tail = aligned_memory(STRIDE), tail_of(len(writer.crcs))
    storage.make_folder(f"{folder}/data/{writer.writer}")
    with ExitStack() as stack:
        new = path  # an object takes another's place when its upload ends
        if storage.atomic_rename:
            new = f"{path}.new"
            stack.callback(storage.remove, new)  # where an extent was not found
        sources = list(_sources(stack, [(storage, folder), *copies], writer.writer))
        sink = stack.enter_context(storage.sink(new, nbytes=end))
        for extent, crc in enumerate(writer.crcs):
            _find_extent(sources, extent, buffer, crc=crc, what=path)
            buffer[EXTENT_BYTES:] = bytes(STRIDE - EXTENT_BYTES)
            buffer[EXTENT_BYTES : EXTENT_BYTES + CRC_BYTES] = struct.pack("<I", crc)
            sink.write(extent * STRIDE, buffer)
        sink.write(end, memoryview(tail))
        sink.finish(nbytes=end + len(tail))
        if new != path:
            storage.rename(new, path)
    storage.sync(f"{folder}/data/{writer.writer}")


def _sources(stack: ExitStack, places: Iterable[Copy], writer: int) -> Iterator[Source]:
    for storage, folder in places:
        with suppress(DataError):
            yield stack.enter_context(storage.source(data_path(folder, writer)))


def _find_extent(sources: Sequence[Source], extent: int, buffer: memoryview, *, crc: int, what: str) -> None:
    """Fill ``buffer`` with the data of an extent whose checksum is ``crc``."""
    for source in sources:
        with suppress(DataError):
            read_extent(source, extent, buffer[:EXTENT_BYTES], crc=crc, what=what)
            return
    raise DamageError(f"{what}: no copy has extent {extent}")
