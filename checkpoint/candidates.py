"""Which checkpoints there are to restore from, newest first, and why not the others.

Nothing but the folders themselves is believed: a folder counts if its manifest is whole, says what the folder's name
says, and every blob is there with the right size and index. That is quick, and finds whatever a crash can leave.
Damage inside the data shows when it is read; then the next candidate's turn comes.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from distrain.core.errors import DataError

from .blob import BlobReader
from .errors import DamageError
from .manifest import MANIFEST, Manifest, read_manifest
from .names import Kind, read_name
from .storage import Storage


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that can be tried, or one that was refused."""

    folder: str
    step: int
    manifest: Manifest | None
    """None if it was refused"""
    refused: str = ""
    """why"""


def candidates(storage: Storage, *, writers: Collection[int] | None = None) -> Iterator[Candidate]:
    """All checkpoints of ``storage``, newest first, each looked at when its turn comes.

    ``writers`` are those whose blobs must be there; all unless given.
    """
    for folder, step in folders(storage):
        try:
            manifest = check_folder(storage, folder, step=step, writers=writers)
        except DataError as error:
            yield Candidate(folder, step, None, str(error))
        else:
            yield Candidate(folder, step, manifest)


def folders(storage: Storage) -> list[tuple[str, int]]:
    """Folders that may be checkpoints with the steps in their names, newest first."""
    found = []
    for folder in storage.names():
        name = read_name(folder)
        if name is None or name.kind not in (Kind.STEP, Kind.REPLACED):
            continue
        if name.kind is Kind.STEP and name.attempt and MANIFEST not in storage.names(folder):
            continue  # being written
        found.append((name.step, name.kind is Kind.STEP, folder))
    return [(folder, step) for step, _, folder in sorted(found, reverse=True)]


def check_folder(
    storage: Storage, folder: str, *, step: int, writers: Collection[int] | None = None
) -> Manifest:
    """The manifest of ``folder``, if that is a whole checkpoint of ``step``.

    Raises:
        DataError: it is not.
    """
    manifest = read_manifest(storage, folder)
    if manifest.step != step:
        raise DamageError(
            f"{folder}/{MANIFEST} is that of another step",
            got=f"step {manifest.step}",
            allowed=f"step {step}",
        )
    for writer in manifest.writers:
        if writers is None or writer.writer in writers:
            with BlobReader(storage, folder, writer=writer.writer, crcs=writer.crcs):
                pass  # opening checks size and index
    return manifest
