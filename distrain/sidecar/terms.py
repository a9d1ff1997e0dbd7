"""What the agreement is told and says: messages to keepers, things to do, and its rules."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
MEMORY = -1
"""the source of what is written from memory"""


@dataclass(frozen=True, slots=True)
class Tell:
    """Send ``message`` to one member, or to all."""

    member: int | None
    message: Message


@dataclass(frozen=True, slots=True)
class Commit:
    """All writers have prepared: make it a checkpoint, then say ``committed`` or ``refused``."""

    tier: int
    step: int
    attempt: str
    digests: Mapping[int, str]
    """of the writers' records"""


@dataclass(frozen=True, slots=True)
class Retry:
    """Say ``retry`` after a while; the tier is ``MEMORY`` where it is ranks that are waited for."""

    tier: int
    step: int
    after_s: float


Output = Tell | Commit | Retry


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is to be agreed on."""

    world_size: int
    every: Sequence[int]
    """steps between two checkpoints, by tier"""
    num_attempts: int
    backoff_s: float
    rejoin_s: float = 30.0
    """how long a lost keeper's ranks may take to come back with another one"""


def due_message(number: int, tiers: Collection[int], *, is_first: bool) -> Message:
    """The tiers that a step goes to; ``is_first`` if it has not been said of this snapshot before."""
    return {"do": "due", "step": number, "tiers": sorted(tiers), "is_first": is_first}


def begin_message(number: int, tier: int, *, attempt: str, source: int) -> Message:
    """Write your ranks' part of a step to a tier."""
    return {"do": "begin", "step": number, "tier": tier, "attempt": attempt, "source": source}


def committed_message(number: int, tier: int, folder: str) -> Message:
    """A step has become a checkpoint."""
    return {"do": "committed", "step": number, "tier": tier, "folder": folder}
