"""From what a person types to a checkpoint: the folder of one, or a root, of which the newest good one is meant."""

from pathlib import Path

from .candidates import candidates
from .errors import DamageError
from .manifest import MANIFEST
from .names import read_name
from .storage import Storage
from .tiers.posix import PosixStorage


def locate(path: str | Path) -> tuple[Storage, str]:
    """Storage and folder of the checkpoint at ``path``.

    Raises:
        DamageError: there is none, or none is good; says why for each.
    """
    at = Path(path).absolute()
    if read_name(at.name) or (at / MANIFEST).exists():
        return PosixStorage(at.parent), at.name
    storage = PosixStorage(at)
    reasons = []
    for candidate in candidates(storage):
        if candidate.manifest:
            return storage, candidate.folder
        reasons.append(f"{candidate.folder}: {candidate.refused.removeprefix('error: ')}")
    if not reasons:
        raise DamageError(
            f"there is no checkpoint in {at}", allowed="a folder with step-00000012 and the like"
        )
    raise DamageError(f"no checkpoint in {at} is good", got="; ".join(reasons).replace("\n", ", "))
