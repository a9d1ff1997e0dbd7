"""Deletes checkpoints that retention no longer wants: after a commit, and never the last good one.

A folder is renamed before it is deleted, so that a crash in the middle leaves rubbish that is known as such, not half
a checkpoint.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from distrain.core.errors import ConfigError
from distrain.core.failpoints import hit

from .candidates import Candidate, candidates
from .commit import discard
from .names import Kind, read_name
from .storage import Storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints to keep."""

    keep_last: int = 3
    """the newest"""
    keep_every: int = 0
    """and those whose step is a multiple of this; 0 for none"""

    def __post_init__(self) -> None:
        if self.keep_last < 1 or self.keep_every < 0:
            raise ConfigError(
                "retention would keep no checkpoint, or a negative number",
                got=f"keep_last = {self.keep_last}, keep_every = {self.keep_every}",
                allowed="keep_last >= 1, keep_every >= 0",
            )


def collect(
    storage: Storage,
    retention: Retention,
    *,
    pinned: Collection[int] = (),
    in_flight: Collection[str] = (),
    writers: Collection[int] | None = None,
    is_good: Callable[[Candidate], bool] = lambda candidate: True,
) -> list[str]:
    """Delete what retention does not keep, and what crashes left behind; returns the names of the folders deleted.

    ``pinned`` steps stay, and so do temporary folders ``in_flight``. Of the newest, only candidates for which
    ``is_good`` holds are counted (a caller may want to verify their bytes); without any, no checkpoint is deleted.
    """
    hit("checkpoint.collect")
    doomed = unwanted(
        storage, retention, pinned=pinned, in_flight=in_flight, writers=writers, is_good=is_good
    )
    for folder in doomed:
        discard(storage, folder)
    return doomed


def unwanted(
    storage: Storage,
    retention: Retention,
    *,
    pinned: Collection[int] = (),
    in_flight: Collection[str] = (),
    writers: Collection[int] | None = None,
    is_good: Callable[[Candidate], bool] = lambda candidate: True,
) -> list[str]:
    """The folders that ``collect`` would delete, rubbish first."""
    read = [(folder, read_name(folder)) for folder in storage.names()]
    rubbish = [folder for folder, name in read if name and name.kind is Kind.TRASH]
    good: list[int] = []
    older: list[str] = []
    for candidate in candidates(storage, writers=writers):
        if len(good) < retention.keep_last and candidate.step not in good:
            if candidate.manifest and is_good(candidate):
                good.append(candidate.step)
            # One that is damaged and newer than the last that is kept may yet be repaired.
        elif candidate.step in good or not _is_kept(candidate.step, retention, pinned):
            older.append(candidate.folder)
    if len(good) == 0:
        return rubbish
    stale = [
        folder
        for folder, name in read
        if name and name.kind is Kind.TEMPORARY and name.step <= good[0] and folder not in in_flight
    ]
    return rubbish + stale + older


def _is_kept(step: int, retention: Retention, pinned: Collection[int]) -> bool:
    return step in pinned or (retention.keep_every > 0 and step % retention.keep_every == 0)
