"""From a path that somebody types to a checkpoint: the folder of one, or the root of several."""

from dataclasses import dataclass
from pathlib import Path

from distrain.core.errors import DataError

from .candidates import candidates
from .manifest import MANIFEST, Manifest, read_manifest
from .storage import Storage
from .tiers.posix import PosixStorage


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint whose manifest has been read and checked."""

    storage: Storage
    folder: str
    manifest: Manifest


def locate(path: str | Path) -> Located:
    """The checkpoint in the folder ``path``, or the newest whole one below it.

    Raises:
        DataError: there is none; says why each candidate was refused.
    """
    folder = Path(path).resolve()
    if (folder / MANIFEST).exists():
        storage = PosixStorage(folder.parent)
        return Located(storage, folder.name, read_manifest(storage, folder.name))
    storage, refused = PosixStorage(folder), []
    for candidate in candidates(storage):
        if candidate.manifest is not None:
            return Located(storage, candidate.folder, candidate.manifest)
        refused.append(f"{candidate.folder}: {candidate.refused}")
    raise DataError(
        f"there is no whole checkpoint in {folder}",
        got="; ".join(refused) or "no folder with a manifest",
        allowed=f"a folder with a {MANIFEST}, or one that holds such folders",
    )
