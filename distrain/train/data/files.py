"""Finds the files of a corpus, completely or not at all.

A plain glob passes over folders it may not list and over links that lead nowhere; training would then go on with
less data than the user believes. Here whatever matches is either a readable regular file or an error.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from distrain.core.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file by its path relative to the folder searched (parts joined with ``/``), and its size."""

    name: str
    num_bytes: int


def find_files(folder: Path, pattern: str, *, skip: frozenset[str] = frozenset()) -> list[FoundFile]:
    """Regular files below ``folder``, at least one, ordered by the parts of their names; links are followed.

    In ``pattern``, ``**`` stands for any number of folders and ``*`` for anything within a name. Hidden names and
    folders named in ``skip`` are left out. Raises ConfigError if the folder does not exist or nothing matches,
    DataError for a folder that cannot be listed and for a match that is no regular file (dangling link, pipe).
    """
    if not folder.is_dir():
        raise ConfigError(
            "data.path is not a folder",
            got=repr(str(folder)),
            allowed="an existing folder",
            hint="--set data.path=FOLDER, or --set data.source=stdlib",
        )
    parts = tuple(part for part in pattern.split("/") if part)
    try:
        found = list(_walk(folder, (), parts, skip, ()))
    except OSError as error:
        raise unreadable(error.filename or folder, error) from error
    if not found:
        raise ConfigError(
            "data.path holds no file that data.pattern matches",
            got=f"path = {str(folder)!r}, pattern = {pattern!r}",
            allowed="at least one file; hidden files and folders do not count",
            hint="--set 'data.pattern=**/*'",
        )
    return found


def unreadable(path: Path | str, error: OSError) -> DataError:
    """The error for a file or folder that the system does not let us read."""
    reason = error.strerror or str(error)
    return DataError(
        "data cannot be read", got=f"{str(path)!r}: {reason}", hint="check the path and who may read it"
    )


def _walk(
    folder: Path,
    above: tuple[str, ...],
    pattern: tuple[str, ...],
    skip: frozenset[str],
    visited: tuple[tuple[int, int], ...],
) -> Iterator[FoundFile]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in visited:  # a link back to a folder above: all of it is found already
        return
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        parts = (*above, entry.name)
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.name not in skip:
                yield from _walk(folder / entry.name, parts, pattern, skip, (*visited, here))
        elif _matches(parts, pattern):
            if not entry.is_file():
                raise DataError(
                    "data is not a regular file",
                    got=repr(entry.path),
                    allowed="files, and links to files",
                    hint="remove it or repair the link",
                )
            yield FoundFile("/".join(parts), entry.stat().st_size)


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        return any(_matches(parts[skipped:], rest) for skipped in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], head) and _matches(parts[1:], rest)
