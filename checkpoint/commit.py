"""How a checkpoint comes to be: everything or nothing, whatever dies when.

Two phases. In the first each writer makes its blob durable and then its record (``blob.py``); in the second, when all
records are there, one process makes the manifest durable and gives the folder its name::

    begin                .tmp-step-00000012-a0/
    each writer          .tmp-step-00000012-a0/data/<writer>/{0, zarr.json}     fsync files and folders: prepared
    commit               .tmp-step-00000012-a0/{manifest.json, zarr.json}       fsync files and folders
                         rename to step-00000012, fsync the root                committed
                         latest                                                 advisory

A crash before the rename leaves what was there before, one after it leaves the new checkpoint. An older attempt at
the same step is renamed out of the way first and stays a candidate until the new one has its name. On media without
an atomic rename (object stores) the folder has its name from the start, and the manifest, written last, commits it.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence

from distrain.core.failpoints import hit

from .blob import BlobReader, record_path
from .errors import DamageError, StorageError
from .manifest import MANIFEST, Manifest, manifest_document, manifest_of
from .names import (
    LATEST,
    Kind,
    attempt_folder,
    read_name,
    replaced_folder,
    step_folder,
    temporary_folder,
    trash_folder,
)
from .record import ATTEMPT, RECORD_LIMIT_BYTES, VERSION, WriterRecord, group_document, parse_record
from .storage import Storage
from .untrusted import Json


def working_folder(storage: Storage, step: int, attempt: str) -> str:
    """Where the checkpoint is written."""
    if not ATTEMPT(attempt):
        raise ValueError(f"an attempt is 1 to 32 of a-z and 0-9, not {attempt!r}")
    return (temporary_folder if storage.atomic_rename else attempt_folder)(step, attempt)


def begin(storage: Storage, step: int, attempt: str) -> str:
    """Make the folder into which writers write; each of them may call this. Returns its name."""
    folder = working_folder(storage, step, attempt)
    hit("checkpoint.begin", step=step)
    storage.make_folder(f"{folder}/data")
    storage.sync()
    return folder


def prepared(storage: Storage, step: int, attempt: str) -> dict[int, WriterRecord]:
    """The records that are there, by writer; unfinished ones are not."""
    folder = working_folder(storage, step, attempt)
    found = {}
    for name in storage.names(f"{folder}/data"):
        if name.isascii() and name.isdecimal():
            with contextlib.suppress(DamageError):
                record = read_record(storage, folder, int(name))
                if (record.step, record.attempt) == (step, attempt):
                    found[record.writer] = record
    return found


def read_record(storage: Storage, folder: str, writer: int) -> WriterRecord:
    """The record of one writer, checked.

    Raises:
        DamageError: it is missing, damaged, or another writer's.
    """
    path = record_path(folder, writer)
    data = storage.read(path, limit_bytes=RECORD_LIMIT_BYTES)
    if data is None:
        raise DamageError(f"{path} is missing")
    record = parse_record(data, path)
    if record.writer != writer:
        raise DamageError(
            f"{path} is the record of another writer", got=str(record.writer), allowed=str(writer)
        )
    return record


def commit(
    storage: Storage,
    step: int,
    attempt: str,
    *,
    mesh: Mapping[str, Json],
    records: Sequence[WriterRecord] | None = None,
) -> str:
    """Make a checkpoint of what all writers have prepared; returns the name of its folder.

    ``records`` are those of all writers where not all of them are in this storage (disks of nodes).

    Raises:
        DamageError: a writer has not prepared, or the records do not fit together.
        StorageError: the medium refuses. What was there before is still there.
    """
    folder = working_folder(storage, step, attempt)
    here = prepared(storage, step, attempt)
    manifest = manifest_of(
        list(here.values()) if records is None else records, created=time.time(), mesh=mesh
    )
    for record in here.values():
        with BlobReader(storage, folder, writer=record.writer, crcs=record.crcs):
            pass  # opening checks that the file is complete
    write_descriptions(storage, folder, manifest)
    hit("checkpoint.manifest", step=step)
    storage.write(f"{folder}/{MANIFEST}", manifest_document(manifest))
    storage.sync(f"{folder}/data")
    storage.sync(folder)
    hit("checkpoint.publish", step=step)
    final = publish(storage, folder) if storage.atomic_rename else folder
    storage.sync()
    hit("checkpoint.committed", step=step)
    with contextlib.suppress(StorageError):  # nothing relies on it, and the checkpoint is safe
        storage.write(LATEST, f"{final}\n".encode())
    hit("checkpoint.latest", step=step)
    return final


def write_descriptions(storage: Storage, folder: str, manifest: Manifest) -> None:
    """The ``zarr.json`` of the groups; that of the outer one says what the manifest's head says."""
    for path, document in descriptions(folder, manifest).items():
        storage.write(path, document)


def descriptions(folder: str, manifest: Manifest) -> dict[str, bytes]:
    """Paths and contents of the files that make the folder a zarr group."""
    head = {
        "version": VERSION,
        "job": manifest.job,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "mesh": dict(manifest.mesh),
    }
    return {
        f"{folder}/zarr.json": group_document({"distrain": head}),
        f"{folder}/data/zarr.json": group_document({}),
    }


def publish(storage: Storage, folder: str) -> str:
    """Give a complete temporary folder its final name; returns that."""
    name = read_name(folder)
    if name is None or name.kind is not Kind.TEMPORARY:
        raise ValueError(f"{folder} is not a temporary folder")
    final = step_folder(name.step)
    if final in storage.names():
        aside = replaced_folder(name.step, name.attempt)
        discard(storage, aside)
        storage.rename(final, aside)
        hit("checkpoint.replaced", step=name.step)
    storage.rename(folder, final)
    return final


def discard(storage: Storage, folder: str) -> None:
    """Delete a folder such that a crash does not leave half a checkpoint; nothing happens if there is none."""
    if folder not in storage.names():
        return
    hit("checkpoint.discard", folder=folder)
    name = read_name(folder)
    if not storage.atomic_rename:
        storage.remove(f"{folder}/{MANIFEST}")  # what is left counts as unfinished
    elif name is None or name.kind is not Kind.TRASH:
        trash = trash_folder(folder)
        storage.remove(trash)
        storage.rename(folder, trash)
        storage.sync()
        folder = trash
    hit("checkpoint.delete", folder=folder)
    storage.remove(folder)
