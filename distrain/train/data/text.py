"""Documents from files of text: a folder of the user's, or the source files of the running Python's library.

The latter is real text of some ten megabytes with a long-tailed length distribution, and it is on every machine.

With a bytewise tokenizer nothing is read before it is needed: lengths are file sizes, and a slice reads its own bytes
only. Otherwise every file is encoded once to learn its length, and the documents used last stay in memory.
"""

import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .files import FoundFile, find_files, unreadable
from .tokenizer import Ids, Tokenizer

STDLIB_SKIPS = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__"})
CACHED_DOCUMENTS = 16


class TextSource:
    """One document a file, in the order of the files."""

    def __init__(self, folder: Path, files: Sequence[FoundFile], tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eos_id = tokenizer.eos_id
        self._folder = folder
        self._files = files
        self._tokenizer = tokenizer
        self._encoded = functools.lru_cache(maxsize=CACHED_DOCUMENTS)(self._encode)
        if tokenizer.is_bytewise:
            lengths = [file.num_bytes for file in files]
        else:
            lengths = [len(self._encoded(document)) for document in range(len(files))]
        self.lengths: Ids = np.array(lengths, dtype=np.int64)

    def name(self, document: int) -> str:
        """Path of the document relative to the folder."""
        return self._files[document].name

    def read(self, document: int, start: int, stop: int) -> Ids:
        """Ids ``start`` to ``stop`` of a document; fewer if the file has shrunk since it was found."""
        if self._tokenizer.is_bytewise:
            return self._tokenizer.encode(self._bytes(document, start, stop - start))
        return self._encoded(document)[start:stop]

    def _encode(self, document: int) -> Ids:
        return self._tokenizer.encode(self._bytes(document, 0, -1))

    def _bytes(self, document: int, start: int, count: int) -> bytes:
        path = self._folder / self._files[document].name
        try:
            with path.open("rb") as file:
                file.seek(start)
                return file.read(count)
        except OSError as error:
            raise unreadable(path, error) from error


def open_text(folder: Path, pattern: str, tokenizer: Tokenizer) -> TextSource:
    """The files below ``folder`` that ``pattern`` matches (``find_files`` says how, and what it raises)."""
    return TextSource(folder, find_files(folder, pattern), tokenizer)


def open_stdlib(tokenizer: Tokenizer) -> TextSource:
    """The running Python's standard library, without its tests and without installed packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    return TextSource(folder, find_files(folder, "**/*.py", skip=STDLIB_SKIPS), tokenizer)
