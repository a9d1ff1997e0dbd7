"""Which sequences make a step: the same answer on every rank, at any step ahead, and after every restart.

A stream is an endless row of sequences, one random order of the split after another. A batch is the next
``global_batch`` of them, so it follows from the position alone, and the position is all there is to remember: not per
rank, hence exact when a run goes on with other ranks or another batch size. Batches carry numbers and lengths only;
each rank fetches the tokens of its own share.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from distrain.core.errors import ConfigError, DataError, Problem, raise_if

from .corpus import Corpus, Split
from .packing import FixedWindows, Packing, WholeDocuments
from .shuffle import shuffled
from .tokenizer import Ids

PACKINGS: Mapping[str, Callable[[Corpus, Split, int], Packing]] = MappingProxyType(
    {"fixed": FixedWindows, "documents": WholeDocuments}
)
VERSION = 1


@dataclass(frozen=True, slots=True, eq=False)
class GlobalBatch:
    """The sequences of one optimizer step over all ranks; identical on each of them."""

    step: int
    """steps taken before this one"""
    ids: Ids
    """int64 [n], the sequences' numbers"""
    lengths: Ids
    """int64 [n], predicted tokens of each sequence"""


def total_tokens(batch: GlobalBatch) -> int:
    """Predicted tokens of the batch, by which the loss is weighted."""
    return int(batch.lengths.sum())


class BatchStream:
    """The batches of a split in a random order that ``seed`` fixes, epoch after epoch without an end.

    Raises ConfigError if the settings are impossible or the split holds no sequence.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        packing: str,
        seq_len: int,
        global_batch: int,
        seed: int,
        split: Split = "train",
    ) -> None:
        raise_if(_problems(packing, seq_len, global_batch))
        self._packing = PACKINGS[packing](corpus, split, seq_len)
        self._global_batch = global_batch
        self._seed = seed
        self._identity = {
            "fingerprint": corpus.fingerprint,
            "split": split,
            "packing": packing,
            "seq_len": seq_len,
            "seed": seed,
        }
        self._position = 0
        self._step = 0
        self.num_sequences = self._packing.num_sequences
        if not self.num_sequences:
            raise ConfigError(
                f"the {split} split holds no sequence",
                got=f"{len(corpus.documents(split))} documents, packing = {packing}, seq_len = {seq_len}",
                allowed="at least one",
                hint="more documents, a shorter data.seq_len, or another data.held_out",
            )

    def peek(self, ahead: int = 0) -> GlobalBatch:
        """The batch ``ahead`` steps after the one that ``next`` would return; nothing is consumed."""
        if ahead < 0:
            raise ValueError("a stream does not go back")
        first = self._position + ahead * self._global_batch
        ids = self._sequences(first, first + self._global_batch)
        return GlobalBatch(self._step + ahead, ids, self._packing.lengths(ids))

    def next(self) -> GlobalBatch:
        """The next batch, which from now on counts as consumed."""
        batch = self.peek()
        self._position += self._global_batch
        self._step += 1
        return batch

    def fetch(self, ids: Sequence[int] | Ids) -> list[Ids]:
        """Tokens of the sequences ``ids``, each int64 [length + 1]. Any thread may call it."""
        numbers = [int(sequence) for sequence in ids]
        if not all(0 <= number < self.num_sequences for number in numbers):
            raise IndexError(f"sequences are numbered 0 to {self.num_sequences - 1}, not {numbers}")
        return [self._packing.tokens(number) for number in numbers]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as plain numbers and strings: sequences and steps consumed, and of what."""
        return {"version": VERSION, "position": self._position, "step": self._step, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, whatever the batch size was then.

        Raises DataError if ``state`` is no such state, ConfigError that lists every setting that differs.
        """
        counts = [state.get(key) for key in ("position", "step")]
        is_whole = state.keys() == self.state_dict().keys() and state["version"] == VERSION
        if not is_whole or not all(type(count) is int and count >= 0 for count in counts):
            got = repr(dict(state))
            raise DataError("not the state of a batch stream", got=got, hint="resume an older checkpoint")
        own = self._identity
        raise_if([_mismatch(key, state[key], own[key]) for key in own if state[key] != own[key]])
        self._position, self._step = state["position"], state["step"]

    def _sequences(self, start: int, stop: int) -> Ids:
        """Sequence numbers at positions ``start`` to ``stop``, which may span epochs."""
        size = self.num_sequences
        parts = []
        for epoch in range(start // size, (stop - 1) // size + 1):
            first = epoch * size
            positions = np.arange(max(start, first) - first, min(stop, first + size) - first, dtype=np.int64)
            parts.append(shuffled(positions, size=size, seed=self._seed, epoch=epoch))
        return np.concatenate(parts)


def _problems(packing: str, seq_len: int, global_batch: int) -> list[Problem]:
    problems = []
    if packing not in PACKINGS:
        problems.append(Problem("data.packing is unknown", repr(packing), ", ".join(PACKINGS)))
    for name, value in (("seq_len", seq_len), ("global_batch", global_batch)):
        if value < 1:
            problems.append(Problem(f"data.{name} is too small", str(value), "1 and more"))
    return problems


def _mismatch(key: str, saved: Any, current: Any) -> Problem:
    if key == "fingerprint":
        return Problem(
            "the corpus is not the one that the checkpoint was trained on",
            f"fingerprint {current} (names, lengths and split of the documents)",
            f"fingerprint {saved}",
            "restore the files and data.held_out, or start a new run from the weights alone",
        )
    return Problem(
        f"{key} differs from the checkpoint's, so that its place in the data means nothing",
        f"{key} = {current}",
        f"{key} = {saved}",
        f"set {key} back to {saved}",
    )
