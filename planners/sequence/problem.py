"""What there is to plan, checked and in numbers: sequences by descending length, and their time at every degree."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distrain.core.errors import ConfigError, InfeasibleError, Problem, raise_if

from .cost import SequenceCost

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SHOWN = 5
_MOST_SLOTS = 2**24


@dataclass(frozen=True)
class StepProblem:
    """The sequences of one step on ``num_slots`` devices; K sequences, D degrees."""

    num_slots: int
    cost: SequenceCost
    degrees: tuple[int, ...]
    order: Ints
    """index of the sequences as given, longest first"""
    lengths: Floats
    """descending"""

    @classmethod
    def of(cls, lengths: Sequence[int], *, num_slots: int, cost: SequenceCost) -> "StepProblem":
        """The problem of ``lengths`` in the order given.

        Raises:
            ConfigError: there is nothing to plan, or a number is none; lists every problem.
            InfeasibleError: a sequence is longer than all memory together.
        """
        raise_if(list(problems(lengths, num_slots=num_slots)))
        given = np.asarray(lengths, dtype=np.float64)
        degrees = cost.degrees(num_slots)
        order = np.argsort(-given, kind="stable")
        problem = cls(num_slots, cost, degrees, order, given[order])
        most = cost.capacity(degrees[-1])
        if problem.lengths[0] > most:
            raise InfeasibleError(
                "a sequence does not fit the memory of the widest group",
                got=f"sequence {order[0]} of {problem.lengths[0]:.0f} tokens",
                allowed=f"{most} tokens, {cost.tokens_per_gpu} on each of {degrees[-1]} devices",
                hint="more devices, more tokens_per_gpu, or leave it out",
            )
        with np.errstate(over="ignore"):
            most_ms = (float(problem.times.max()) + cost.beta1) * len(order) * num_slots
        if not math.isfinite(most_ms):
            raise ConfigError(
                "the cost model gives times that no number can hold",
                got=f"{problem.times.max():g} ms for a sequence of {problem.lengths[0]:g} tokens",
                hint="smaller alpha1, alpha2, beta1, or more GB/s",
            )
        return problem

    @cached_property
    def times(self) -> Floats:
        """Milliseconds of each sequence at each degree (K x D), whether it fits there or not."""
        return np.column_stack([self.cost.sequence_ms(self.lengths, degree) for degree in self.degrees])

    @cached_property
    def capacities(self) -> Floats:
        """Tokens of a group of each degree (D)."""
        return np.array([self.cost.capacity(degree) for degree in self.degrees], dtype=np.float64)

    @cached_property
    def areas(self) -> Floats:
        """The least that each sequence can cost in slots times milliseconds (K)."""
        return self._least(self.times * np.array(self.degrees))

    def _least(self, values: Floats) -> Floats:
        """Of each sequence at the degrees at which it fits (K)."""
        fits = self.lengths[:, None] <= self.capacities
        return np.where(fits, values, np.inf).min(axis=1)  # type: ignore[no-any-return]

    @property
    def least_waves(self) -> int:
        """No plan has fewer micro-batches: the tokens need the memory."""
        memory = self.num_slots * self.cost.tokens_per_gpu
        return max(1, math.ceil(float(self.lengths.sum()) / memory - 1e-9))

    @property
    def area_bound_ms(self) -> float:
        """No lock-step plan is faster: its work spread evenly, or its slowest sequence on as many slots as it likes,
        and the fixed costs of its micro-batches."""
        spread_ms = float(self.areas.sum()) / self.num_slots
        return max(spread_ms, float(self._least(self.times).max())) + self.cost.beta1 * self.least_waves


def problems(lengths: Sequence[int], *, num_slots: int) -> Iterator[Problem]:
    """Why there is nothing to plan, whatever it costs."""
    if not 1 <= num_slots <= _MOST_SLOTS:
        yield Problem("this is no number of devices to plan for", f"{num_slots} slots", f"1 to {_MOST_SLOTS}")
    try:
        given = np.asarray(lengths, dtype=np.float64)
    except (OverflowError, TypeError, ValueError) as error:
        yield Problem("lengths are not a list of whole numbers", str(error))
        return
    if given.size == 0:
        yield Problem("there are no sequences to plan", "no lengths", "one length or more")
    elif given.ndim != 1 or not np.isfinite(given).all():
        yield Problem("lengths are not a list of whole numbers", str(given)[:80])
    elif (wrong := np.flatnonzero((given < 1) | (given != np.floor(given)))).size:
        shown = ", ".join(f"{given[index]:g} (sequence {index})" for index in wrong[:_SHOWN])
        more = f" and {wrong.size - _SHOWN} more" if wrong.size > _SHOWN else ""
        yield Problem(
            "a sequence has no tokens", shown + more, "whole numbers, 1 or more", "leave empty sequences out"
        )
