"""Bytes to token ids and back.

The tokenizer that comes along knows bytes only: it needs no vocabulary file, treats every language alike, and finds
nothing undecodable. Any other tokenizer fits in through the Protocol.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Tokenizer(Protocol):
    """What the data pipeline needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every id is below this."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a document; ``encode`` never returns it."""
        ...

    @property
    def is_bytewise(self) -> bool:
        """Whether every byte is one id, so that lengths and slices follow without encoding."""
        ...

    def encode(self, text: bytes | str) -> Ids:
        """Ids of ``text``, int64 [n], without an end of document."""
        ...

    def decode(self, ids: Ids) -> bytes:
        """The bytes that ``ids`` stand for; ids that are no text (end of document, padding) are left out."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes, 256 ends a document, 257 is padding."""

    vocab_size = 258
    eos_id = 256
    pad_id = 257
    is_bytewise = True

    def encode(self, text: bytes | str) -> Ids:
        """One id a byte (of the UTF-8 encoding, if ``text`` is a string)."""
        data = text.encode() if isinstance(text, str) else text
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Ids) -> bytes:
        """Inverse of ``encode``; raises ValueError for ids outside the vocabulary."""
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise ValueError(f"ids must lie in [0, {self.vocab_size}), not {ids.min()} to {ids.max()}")
        return ids[ids < self.eos_id].astype(np.uint8).tobytes()
