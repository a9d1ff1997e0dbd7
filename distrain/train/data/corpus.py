"""A corpus: documents with stable names, known lengths, and tokens on demand, of which a part is held out.

Whether a document is held out depends on a hash of its name alone. A document added later therefore moves no other
from validation to training, and all ranks agree without talking. Names, lengths and the split make the fingerprint
that a resumed run compares: a position in the data means something only for the same data.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from distrain.core.config import DataConfig
from distrain.core.errors import ConfigError, DataError

from .text import open_stdlib, open_text
from .token_files import open_tokens
from .tokenizer import ByteTokenizer, Ids, Tokenizer

Split = Literal["train", "held_out"]


class Source(Protocol):
    """Where documents come from; they are numbered 0 to ``len(lengths) - 1``."""

    vocab_size: int
    eos_id: int
    lengths: Ids

    def name(self, document: int) -> str:
        """A name that stays the document's own when others are added."""
        ...

    def read(self, document: int, start: int, stop: int) -> Ids:
        """Ids ``start`` to ``stop`` of a document."""
        ...


class Corpus:
    """Documents of a source, the fraction ``held_out`` of which is for validation.

    Of two documents and more at least one is held out, unless the fraction is 0.
    """

    def __init__(self, source: Source, *, held_out: float) -> None:
        if not 0 <= held_out < 1:
            raise ConfigError(
                "data.held_out is not a fraction", got=str(held_out), allowed="0 <= held_out < 1"
            )
        self._source = source
        self.vocab_size = source.vocab_size
        self.eos_id = source.eos_id
        self.lengths = source.lengths
        keys = np.array(
            [_key(source.name(document)) for document in range(len(self.lengths))], dtype=np.uint64
        )
        self._is_held_out = _held_out(keys, held_out)
        self.fingerprint = _fingerprint(keys, self.lengths, self._is_held_out, self.vocab_size, self.eos_id)

    def documents(self, split: Split) -> Ids:
        """Numbers of the documents of a split, ascending."""
        return np.flatnonzero(self._is_held_out == (split == "held_out"))

    def name(self, document: int) -> str:
        """The document's name, for messages."""
        return self._source.name(document)

    def read(self, document: int, start: int, stop: int) -> Ids:
        """Ids ``start`` to ``stop`` of a document, int64 [stop - start]; DataError if it cannot be read in full."""
        ids = self._source.read(document, start, stop)
        if len(ids) != stop - start:
            raise DataError(
                "a document has changed since the corpus was opened",
                got=f"{self.name(document)!r}: {len(ids)} tokens from {start}",
                allowed=f"{stop - start} tokens",
                hint="leave the files of a corpus alone while it is in use, then resume",
            )
        if len(ids) and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise DataError(
                "a document has token ids that are not in the vocabulary",
                got=f"{self.name(document)!r}: {ids.min()} to {ids.max()}",
                allowed=f"0 to {self.vocab_size - 1}",
                hint="tokenize the corpus again",
            )
        return ids


def open_corpus(data: DataConfig, *, vocab_size: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus that ``data`` asks for, tokenized into bytes unless ``tokenizer`` is given.

    Raises ConfigError if the source does not exist or the model's ``vocab_size`` is smaller than the corpus needs,
    DataError if data cannot be read or is damaged.
    """
    coder: Tokenizer = tokenizer or ByteTokenizer()
    folder = Path(data.path).expanduser()
    sources: dict[str, Callable[[], Source]] = {
        "stdlib": lambda: open_stdlib(coder),
        "text": lambda: open_text(folder, data.pattern, coder),
        "tokens": lambda: open_tokens(folder, data.pattern),
    }
    if data.source not in sources:
        raise ConfigError("data.source is unknown", got=repr(data.source), allowed=", ".join(sources))
    corpus = Corpus(sources[data.source](), held_out=data.held_out)
    if corpus.vocab_size > vocab_size:
        raise ConfigError(
            "model.vocab_size is smaller than the vocabulary of the data",
            got=f"model.vocab_size = {vocab_size}",
            allowed=f"at least {corpus.vocab_size}",
            hint=f"--set model.vocab_size={corpus.vocab_size}",
        )
    return corpus


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")


def _held_out(keys: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """The keys in the lowest ``fraction`` of all 64-bit numbers, or the lowest key alone."""
    chosen = keys < np.uint64(int(fraction * 2.0**64))
    if fraction > 0 and len(keys) > 1 and not chosen.any():
        chosen[np.argmin(keys)] = True
    return chosen


def _fingerprint(keys: NDArray[np.uint64], lengths: Ids, held_out: NDArray[np.bool_], *sizes: int) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in (np.array(sizes, dtype="<i8"), keys.astype("<u8"), lengths.astype("<i8"), held_out):
        digest.update(part.tobytes())
    return digest.hexdigest()
