"""How packed sequences lie on the ranks of one sequence-parallel group, as data that every rank computes alike.

A group of degree d is a grid of ``ring`` places, each of ``ulysses`` ranks (USP, Fang & Zhao 2024)::

    index = place * ulysses + ulysses_index

*Ulysses* (ring = 1): the sequences one after the other, cut into d equal pieces wherever that falls. Attention gives
each rank all tokens of some heads, so that where the cuts are does not matter.

*Ring*: each place keeps its queries while keys and values go round. A token's causal work grows with its position,
so a long sequence is cut into 2 * ring chunks, and place p takes chunk p and the p-th from the end::

    places of the chunks, ring = 3:    0 1 2 2 1 0

Chunks need not be equal: what a place takes fills it up to its share, whatever the lengths are. A sequence much
shorter than a place's share is not cut at all. It goes whole to the place with the fewest tokens, and its keys never
travel; the long ones level out what that leaves uneven.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distrain.core.errors import ConfigError, Problem

WHOLE_PER_PLACE = 8
"""a sequence of which a place could take that many stays whole: less would unbalance the causal work"""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence on one place of the ring."""

    sequence: int
    start: int
    """position of the first token in its sequence"""
    stop: int
    row: int
    """where the first token lies among the tokens of the place"""

    @property
    def end_row(self) -> int:
        """The row behind the last token."""
        return self.row + self.stop - self.start


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """Where each token of a group's sequences is; ``build`` makes it. All of it is alike on all ranks."""

    lengths: tuple[int, ...]
    ulysses: int
    ring: int
    num_local: int
    """tokens of every rank, padding included; 0 if the group has no sequences"""
    places: tuple[tuple[Span, ...], ...]
    """what each place of the ring holds, by rows; parts of cut sequences come first"""
    num_travelling: int
    """rows of a place, from the first, whose keys and values the other places need"""

    @classmethod
    def build(
        cls, lengths: Sequence[int], *, ulysses: int = 1, ring: int = 1, multiple_of: int = 1
    ) -> "SequenceLayout":
        """Lay out sequences of ``lengths`` tokens over ulysses * ring ranks.

        Every rank gets the same number of tokens, a multiple of ``multiple_of``. ConfigError on sequences without
        tokens and degrees below 1.
        """
        _check(lengths, {"ulysses": ulysses, "ring": ring, "multiple_of": multiple_of})
        whole, cut = _deal([int(length) for length in lengths], ring)
        places = tuple(
            _in_rows((*cut[place], *((sequence, 0, int(lengths[sequence])) for sequence in whole[place])))
            for place in range(ring)
        )
        fullest = max((spans[-1].end_row for spans in places if spans), default=0)
        return cls(
            lengths=tuple(int(length) for length in lengths),
            ulysses=ulysses,
            ring=ring,
            num_local=-(-fullest // (ulysses * multiple_of)) * multiple_of,
            places=places,
            num_travelling=max(sum(stop - start for _, start, stop in parts) for parts in cut),
        )

    @property
    def degree(self) -> int:
        """Ranks of the group."""
        return self.ulysses * self.ring

    def tokens(self, index: int) -> NDArray[np.int64]:
        """[num_local]: which token of the concatenated sequences each local token is; -1 for padding."""
        first = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        return self._rows(
            index, ((int(first[span.sequence]) + span.start, span) for span in self._on(index)), -1
        )

    def positions(self, index: int) -> NDArray[np.int64]:
        """[num_local]: position of each local token in its own sequence; 0 for padding."""
        return self._rows(index, ((span.start, span) for span in self._on(index)), 0)

    def _on(self, index: int) -> tuple[Span, ...]:
        if not 0 <= index < self.degree:
            raise IndexError(f"index {index} in a group of {self.degree}")
        return self.places[index // self.ulysses]

    def _rows(self, index: int, numbered: Iterable[tuple[int, Span]], padding: int) -> NDArray[np.int64]:
        """The part of rank ``index`` of its place's rows, each span counting up from its number."""
        rows = np.full(self.ulysses * self.num_local, padding, dtype=np.int64)
        for number, span in numbered:
            rows[span.row : span.end_row] = np.arange(number, number + span.stop - span.start)
        own = index % self.ulysses * self.num_local
        return rows[own : own + self.num_local]


def usp_degrees(degree: int, *, num_heads: int) -> tuple[int, int]:
    """(ulysses, ring) for a group of ``degree`` ranks: as many ranks share the heads as can do so evenly."""
    ulysses = math.gcd(degree, num_heads)
    return ulysses, degree // ulysses


def _check(lengths: Sequence[int], degrees: dict[str, int]) -> None:
    empty = [index for index, length in enumerate(lengths) if length < 1]
    problems = [
        Problem(f"{name} must be at least 1", got=str(value), allowed=">= 1", hint=f"{name}=1")
        for name, value in degrees.items()
        if value < 1
    ]
    if empty:
        shown = ", ".join(f"sequence {index}: {lengths[index]}" for index in empty[:5])
        problems.append(
            Problem(
                "sequences without tokens cannot be laid out",
                got=shown + (", ..." if len(empty) > 5 else ""),
                allowed="lengths of at least 1",
                hint="leave empty sequences out",
            )
        )
    if problems:
        raise ConfigError.of(problems)


def _in_rows(parts: Iterable[tuple[int, int, int]]) -> tuple[Span, ...]:
    """(sequence, start, stop) one below the other; neighbours that continue each other are one span."""
    spans: list[Span] = []
    for sequence, start, stop in parts:
        row = spans[-1].end_row if spans else 0
        if spans and spans[-1].sequence == sequence and spans[-1].stop == start:
            last = spans.pop()
            spans.append(Span(sequence, last.start, stop, last.row))
        elif stop > start:
            spans.append(Span(sequence, start, stop, row))
    return tuple(spans)


def _deal(lengths: list[int], ring: int) -> tuple[list[list[int]], list[list[tuple[int, int, int]]]]:
    """Sequences that each place takes whole, and its parts of cut ones; token counts differ by one at the most."""
    share, more = divmod(sum(lengths), ring)
    whole: list[list[int]] = [[] for _ in range(ring)]
    loads = [0] * ring
    for sequence in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        place = min(range(ring), key=loads.__getitem__)
        fits = loads[place] + lengths[sequence] <= share
        if ring == 1 or (fits and lengths[sequence] * WHOLE_PER_PLACE <= share):
            whole[place].append(sequence)
            loads[place] += lengths[sequence]
    rest = sorted(set(range(len(lengths))).difference(*whole))
    rooms = [share + (place < more) - load for place, load in enumerate(loads)]
    cut: list[list[tuple[int, int, int]]] = [[] for _ in range(ring)]
    for sequence in rest:
        amounts = _apportion(lengths[sequence], rooms)
        rooms = [room - amount for room, amount in zip(rooms, amounts, strict=True)]
        for place, start, stop in _zigzag(amounts):
            cut[place].append((sequence, start, stop))
    return [sorted(sequences) for sequences in whole], cut


def _apportion(amount: int, rooms: list[int]) -> list[int]:
    """``amount`` in proportion to ``rooms``, in whole numbers, none above its room (largest remainders)."""
    total = sum(rooms)
    parts = [amount * room // total for room in rooms]
    by_remainder = sorted(range(len(rooms)), key=lambda place: -(amount * rooms[place] % total))
    for place in by_remainder[: amount - sum(parts)]:
        parts[place] += 1
    return parts


def _zigzag(amounts: list[int]) -> list[tuple[int, int, int]]:
    """(place, start, stop) of the chunks of a sequence of which place p takes ``amounts[p]`` tokens."""
    places = range(len(amounts))
    order = [(place, (amounts[place] + 1) // 2) for place in places]
    order += [(place, amounts[place] // 2) for place in reversed(places)]
    chunks, start = [], 0
    for place, size in order:
        chunks.append((place, start, start + size))
        start += size
    return chunks
