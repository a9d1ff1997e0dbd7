"""What the folders below a checkpoint root are called, and what their names say.

::

    step-00000012              committed
    step-00000012-<attempt>    the same on media that cannot rename; committed once it has a manifest
    .tmp-step-00000012-<attempt>   being written
    .old-step-00000012-<attempt>   replaced by another attempt at the same step; good until that one is in its place
    .trash-<any of these>      being deleted
    latest                     the name of the newest, for people: nothing relies on it
"""

import re
from dataclasses import dataclass
from enum import StrEnum

LATEST = "latest"
_NAME = re.compile(r"(\.tmp-|\.old-|\.trash-(?:\.tmp-|\.old-)?|)step-([0-9]{8,16})(?:-([a-z0-9]{1,32}))?")


class Kind(StrEnum):
    """What has become of a folder."""

    STEP = "step"
    TEMPORARY = "temporary"
    REPLACED = "replaced"
    TRASH = "trash"


@dataclass(frozen=True, slots=True)
class FolderName:
    """A folder's name, read."""

    kind: Kind
    step: int
    attempt: str
    """empty if the name does not say"""


def step_folder(step: int) -> str:
    """A committed checkpoint."""
    return f"step-{step:08d}"


def attempt_folder(step: int, attempt: str) -> str:
    """A checkpoint where nothing can be renamed."""
    return f"{step_folder(step)}-{attempt}"


def temporary_folder(step: int, attempt: str) -> str:
    """A checkpoint that is being written."""
    return f".tmp-{attempt_folder(step, attempt)}"


def replaced_folder(step: int, attempt: str) -> str:
    """A checkpoint whose place another attempt takes."""
    return f".old-{attempt_folder(step, attempt)}"


def trash_folder(folder: str) -> str:
    """A folder that is being deleted."""
    return f".trash-{folder}"


def read_name(name: str) -> FolderName | None:
    """What ``name`` says; None if it is no folder of a checkpoint."""
    match = _NAME.fullmatch(name)
    if not match:
        return None
    prefix, step, attempt = match[1], int(match[2]), match[3] or ""
    if step_folder(step) not in name:  # superfluous zeros: no name that is given here
        return None
    if prefix.startswith(".trash-"):
        kind = Kind.TRASH
    else:
        kind = {"": Kind.STEP, ".tmp-": Kind.TEMPORARY, ".old-": Kind.REPLACED}[prefix]
    return FolderName(kind, step, attempt)
