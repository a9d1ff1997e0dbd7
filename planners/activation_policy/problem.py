"""What there is to decide, and a decision: how many tokens of each layer and tensor group are kept, swapped, made anew.

A rank runs *passes*, the forward or backward of all its layers on one micro-batch, in the order of its pipeline
schedule. A layer's activations are born in an *event*, its forward, and consumed in another, its backward. They live in
one of two rounding buffers that events take in turn, and leave them for the host (swap), for other device memory
(keep), or for nowhere (recompute). Where backward follows forward at once, the last two layers stay where they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from distrain.core.errors import Problem, raise_if

from ..activation_plan import TOKENS, rounded_down
from ..schedules import Op, PipelineSchedule

ROUNDING_BUFFERS = 2


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Skeletal tensors of a layer that share a fate; sizes of one rank and micro-batch."""

    name: str
    num_bytes: int
    recompute_s: float | None
    """time to make all of it again; None if that is not done"""


@dataclass(frozen=True, slots=True)
class Pass:
    """Forward or backward of a stage on one micro-batch."""

    backward: bool
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Event:
    """Forward or backward of one layer on one micro-batch."""

    backward: bool
    micro_batch: int
    layer: int
    resident: bool
    """backward follows so soon that the layer's activations stay in their rounding buffer"""
    buffer: int
    """the rounding buffer it works in"""


@dataclass(frozen=True, kw_only=True)
class ActivationTask:
    """One rank's problem; all its layers are alike."""

    groups: tuple[TensorGroup, ...]
    num_layers: int
    num_tokens: int
    """rows of one rank and micro-batch: fractions are whole multiples of ``TOKENS`` of these"""
    forward_s: float
    """of one layer"""
    backward_s: float
    passes: tuple[Pass, ...]
    d2h_bytes_s: float
    h2d_bytes_s: float
    host_bytes: float
    """of this rank, for swapped activations"""
    device_bytes: float
    """for rounding buffers and kept activations"""

    def __post_init__(self) -> None:
        raise_if(
            [
                Problem(f"{name} must be positive", got=str(value), allowed="above 0")
                for name, value in (
                    ("the number of layers", self.num_layers),
                    ("the number of tokens", self.num_tokens),
                    ("a layer's forward time", self.forward_s),
                    ("a layer's backward time", self.backward_s),
                    ("the bandwidth to the host", self.d2h_bytes_s),
                    ("the bandwidth from the host", self.h2d_bytes_s),
                )
                if not value > 0
            ]
        )

    @property
    def layer_bytes(self) -> int:
        """What one layer leaves for backward."""
        return sum(group.num_bytes for group in self.groups)

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """All events in order. Buffers are taken in turn; backward that follows at once finds its own where it was."""
        found: list[Event] = []
        buffer = 0
        for place, each in enumerate(self.passes):
            pair = self.passes[place - 1 : place + 1] if each.backward else self.passes[place : place + 2]
            at_once = len(pair) == 2 and (pair[0].backward, pair[1].backward) == (False, True)
            at_once = at_once and pair[0].micro_batch == pair[1].micro_batch
            layers = range(self.num_layers)
            for layer in reversed(layers) if each.backward else layers:
                resident = at_once and layer >= self.num_layers - ROUNDING_BUFFERS
                if not (resident and each.backward and layer == self.num_layers - 1):
                    buffer = 1 - buffer
                found.append(Event(each.backward, each.micro_batch, layer, resident, buffer))
        return tuple(found)

    @cached_property
    def in_flight(self) -> tuple[tuple[int, ...], ...]:
        """How often each layer's activations are away from the rounding buffers at once: all worst moments."""
        counts = [0] * self.num_layers
        found = set()
        for event in self.events:
            if not event.resident:
                counts[event.layer] += -1 if event.backward else 1
            if not event.backward:
                found.add(tuple(counts))
        return tuple(
            each for each in found
            if not any(other != each and _covers(other, each) for other in found)
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Policy:
    """Tokens by layer and group, [num_layers][num_groups]; what is neither kept nor swapped is made again."""

    kept: tuple[tuple[int, ...], ...]
    swapped: tuple[tuple[int, ...], ...]


def stage_passes(schedule: PipelineSchedule, *, rank: int) -> tuple[Pass, ...]:
    """The passes of ``rank``; its stages count as one, and a backward in two parts as one at its first."""
    done = set()
    found = []
    for step in schedule.steps[rank]:
        key = (step.op is not Op.FORWARD, step.micro_batch)
        if step.op is not Op.BACKWARD_WEIGHT and key not in done:
            done.add(key)
            found.append(Pass(*key))
    return tuple(found)


def uniform(task: ActivationTask, *, kept: Sequence[float], swapped: Sequence[float]) -> Policy:
    """The policy that treats all layers alike, with these fractions of each group, rounded as plans are."""
    rows = [
        whole_tokens(task.num_tokens, keep=keep, swap=swap, recomputed=group.recompute_s is not None)
        for group, keep, swap in zip(task.groups, kept, swapped, strict=True)
    ]
    return Policy(
        (tuple(keep for keep, _ in rows),) * task.num_layers,
        (tuple(swap for _, swap in rows),) * task.num_layers,
    )


def whole_tokens(num_tokens: int, *, keep: float, swap: float, recomputed: bool) -> tuple[int, int]:
    """Kept and swapped tokens for these fractions: down to multiples of ``TOKENS``, never more memory than asked for.

    What is not made again has no rest: swap takes it. A rest of fewer than ``TOKENS`` rows goes with 128 others.
    """
    kept = rounded_down(keep * num_tokens)
    kept = num_tokens if num_tokens - kept < TOKENS and keep > 1 - 1e-9 else kept
    if not recomputed:
        return kept, num_tokens - kept
    swapped = rounded_down(swap * num_tokens)
    if keep + swap > 1 - 1e-9:
        swapped = num_tokens - kept
    if 0 < num_tokens - kept - swapped < TOKENS:
        swapped, kept = (swapped - TOKENS, kept) if swapped >= TOKENS else (swapped, kept - TOKENS)
    return max(0, kept), max(0, swapped)


def _covers(more: Sequence[int], less: Sequence[int]) -> bool:
    return all(a >= b for a, b in zip(more, less, strict=True))
