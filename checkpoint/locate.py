"""From what somebody types to a checkpoint: the folder of one, or the root of several, by path or address."""

import os
from dataclasses import dataclass
from pathlib import Path

from distrain.core.errors import DataError

from .candidates import candidates
from .manifest import MANIFEST, Manifest, read_manifest
from .names import read_name
from .storage import Storage
from .tiers import open_storage


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint whose manifest has been read and checked."""

    storage: Storage
    folder: str
    manifest: Manifest


def place(address: str | os.PathLike[str]) -> tuple[Storage, str]:
    """The storage that ``address`` leads to, and the folder of the checkpoint there; empty if it is the root."""
    whole = os.fspath(address)
    if "://" not in whole:
        whole = str(Path(whole).resolve())
    name = whole.rstrip("/").rpartition("/")[2]
    if read_name(name) or MANIFEST in open_storage(whole).names():
        return open_storage(whole.rstrip("/").removesuffix(name)), name
    return open_storage(whole), ""


def locate(address: str | os.PathLike[str]) -> Located:
    """The checkpoint at ``address``, or the newest whole one below it.

    Raises:
        DataError: there is none; says why each candidate was refused.
    """
    storage, folder = place(address)
    if folder:
        return Located(storage, folder, read_manifest(storage, folder))
    refused = []
    for candidate in candidates(storage):
        if candidate.manifest is not None:
            return Located(storage, candidate.folder, candidate.manifest)
        refused.append(f"{candidate.folder}: {candidate.refused}")
    raise DataError(
        f"there is no whole checkpoint in {storage.name}",
        got="; ".join(refused) or "no folder with a manifest",
        allowed=f"a folder with a {MANIFEST}, or one that holds such folders",
    )
