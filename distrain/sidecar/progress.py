"""How far a step has come, as the coordinator knows it."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Attempt:
    """One try at writing a step to a tier."""

    name: str
    source: int
    tries: int
    digests: dict[int, str] = field(default_factory=dict)
    active: bool = True
    committing: bool = False


@dataclass(slots=True)
class StepProgress:
    """Which ranks have a step, and where it is written."""

    is_decided: bool = False
    """its tiers have been chosen"""
    durable: bool = False
    streams: bool = False
    opened: dict[int, int] = field(default_factory=dict)
    """order of the snapshot by rank: a step that is saved again gets others"""
    sealed: dict[int, int] = field(default_factory=dict)
    """member by rank"""
    protected: bool = False
    waiting: list[int] = field(default_factory=list)
    """tiers whose turn has not come"""
    attempts: dict[int, Attempt] = field(default_factory=dict)
    """by tier"""
    committed: dict[int, str] = field(default_factory=dict)
    """folder by tier"""

    @property
    def tiers(self) -> set[int]:
        """Where the step is, or is to be."""
        return {*self.waiting, *self.attempts, *self.committed}
