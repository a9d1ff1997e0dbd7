"""Cuts the documents of a split into sequences, numbered, without reading any.

Every document is followed by the end-of-document token. A sequence that predicts n tokens has n + 1: inputs are all
but the last, targets all but the first.

``FixedWindows`` puts all documents in a row and cuts it every ``seq_len`` tokens::

    d o c 0 . d 1 . d o c 2 .          . end of document
    [_______]                          window 0 predicts the last 4 of its 5 tokens (seq_len 4)
            [_______]                  window 1 starts with the token that window 0 ended with
                    [_______]

``WholeDocuments`` keeps documents apart, so that lengths vary as those of the documents do; only what is longer than
``seq_len`` is cut into pieces, with the same overlap of one token.
"""

from typing import Protocol

import numpy as np

from .corpus import Corpus, Split
from .tokenizer import Ids


class Packing(Protocol):
    """Sequences numbered 0 to ``num_sequences - 1``."""

    num_sequences: int

    def lengths(self, ids: Ids) -> Ids:
        """Predicted tokens of each sequence, int64 [n]."""
        ...

    def tokens(self, sequence: int) -> Ids:
        """Ids of a sequence, int64 [length + 1]."""
        ...


class FixedWindows:
    """Windows of ``seq_len`` predicted tokens; a rest at the end that fills no window is not used."""

    def __init__(self, corpus: Corpus, split: Split, seq_len: int) -> None:
        self._corpus = corpus
        self._documents = corpus.documents(split)
        self._starts = np.concatenate([[0], np.cumsum(corpus.lengths[self._documents] + 1)])
        self._seq_len = seq_len
        self.num_sequences = max(0, int(self._starts[-1]) - 1) // seq_len

    def lengths(self, ids: Ids) -> Ids:
        """``seq_len`` for each."""
        return np.full(len(ids), self._seq_len, dtype=np.int64)

    def tokens(self, sequence: int) -> Ids:
        """Ids of window ``sequence``, from as many documents as it reaches into."""
        begin = sequence * self._seq_len
        end = begin + self._seq_len + 1
        first = np.searchsorted(self._starts, begin, side="right") - 1
        last = np.searchsorted(self._starts, end, side="left")
        reached = zip(self._documents[first:last].tolist(), self._starts[first:last].tolist(), strict=True)
        return np.concatenate(
            [_with_eos(self._corpus, document, begin - start, end - start) for document, start in reached]
        )


class WholeDocuments:
    """Documents, or pieces of at most ``seq_len`` predicted tokens; empty documents are left out."""

    def __init__(self, corpus: Corpus, split: Split, seq_len: int) -> None:
        self._corpus = corpus
        documents = corpus.documents(split)
        self._documents = documents[corpus.lengths[documents] > 0]
        self._lengths = corpus.lengths[self._documents]
        pieces = -(-self._lengths // seq_len)
        self._first = np.concatenate([[0], np.cumsum(pieces)])  # number of each document's first piece
        self._seq_len = seq_len
        self.num_sequences = int(self._first[-1])

    def lengths(self, ids: Ids) -> Ids:
        """Predicted tokens of each piece: those of the document, with its end and without its first."""
        at = np.searchsorted(self._first, ids, side="right") - 1
        left: Ids = self._lengths[at] - (ids - self._first[at]) * self._seq_len
        return np.minimum(left, self._seq_len)

    def tokens(self, sequence: int) -> Ids:
        """Ids of piece ``sequence``."""
        at = int(np.searchsorted(self._first, sequence, side="right")) - 1
        begin = (sequence - int(self._first[at])) * self._seq_len
        return _with_eos(self._corpus, int(self._documents[at]), begin, begin + self._seq_len + 1)


def _with_eos(corpus: Corpus, document: int, start: int, stop: int) -> Ids:
    """Ids ``start`` to ``stop`` of a document and its end token, as far as they exist."""
    length = int(corpus.lengths[document])
    ids = corpus.read(document, max(0, start), min(stop, length))
    return np.append(ids, corpus.eos_id) if stop > length else ids
