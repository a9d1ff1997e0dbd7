"""Where checkpoints are kept: one file a kind of medium, each a ``Storage``."""

from ..storage import Storage


def open_storage(url: str) -> Storage:
    """The storage at ``url``: a path, or an address that fsspec knows."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        from .posix import PosixStorage

        return PosixStorage(rest if separator else url)
    from .remote import RemoteStorage

    return RemoteStorage(url)
