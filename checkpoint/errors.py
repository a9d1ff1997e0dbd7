"""What can go wrong with a checkpoint on its medium::

DataError
├── StorageError   the medium refused: full, read-only, broken
└── DamageError    what was read is not what was written, or not what a checkpoint may say
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from distrain.core.errors import DataError

_HINTS = {
    errno.ENOSPC: "free space, or keep fewer checkpoints",
    errno.EDQUOT: "free space below the quota, or keep fewer checkpoints",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that this user may write to",
    errno.EIO: "the device reports an error: look at the kernel's log, and save elsewhere",
}


class StorageError(DataError):
    """A file operation failed; ``errno`` says why."""

    def __init__(self, doing: str, cause: OSError) -> None:
        name = errno.errorcode.get(cause.errno or 0, type(cause).__name__)
        super().__init__(
            f"cannot {doing}",
            got=f"{name}: {cause.strerror or cause}",
            hint=_HINTS.get(cause.errno or 0, ""),
        )
        self.errno = cause.errno


class DamageError(DataError):
    """Bytes are not what they should be; the message names what and where."""


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that says what failed."""
    try:
        yield
    except OSError as cause:
        raise StorageError(doing, cause) from cause
