"""Plans on disk: a reader finds the old one or the new one, never half of either."""

import os
import tempfile
from pathlib import Path


def save(path: Path | str, text: str) -> None:
    """Write ``text`` to ``path``; folders that are not there are made. Raises OSError.

    A link stays a link; what is no file, such as a pipe, is written to as it is.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # first: the link to an open pipe names no path
        Path(path).write_text(text)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".plan.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
