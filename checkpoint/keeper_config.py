"""What the trainers tell their keeper about saving; the same on all ranks."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from distrain.core.errors import Problem, raise_if


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """One level of storage below memory."""

    url: str
    """a folder, or an address that fsspec knows (``s3://bucket/run``); ``{node}`` stands for the rank of the node"""
    name: str = ""
    """how commands and metrics call it; empty: the url"""
    every: int = 1
    """steps between two checkpoints on this tier; the first snapshot that is as many steps later is written"""
    keep_last: int = 3
    """checkpoints to keep: the newest"""
    keep_every: int = 0
    """and those whose step is a multiple of this; 0 for none"""
    shared: bool = True
    """all nodes see the same folder; False for a disk of the node, on which each node has its own writers' bytes"""
    bytes_per_s: float = 0.0
    """most that this node writes to it; 0 for no limit"""

    def __post_init__(self) -> None:
        """The keeper works in another folder: paths become absolute."""
        if "://" not in self.url:
            object.__setattr__(self, "url", os.path.abspath(self.url))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperConfig:
    """All that a keeper needs to know of the job."""

    tiers: Sequence[TierConfig] = ()
    """fastest first; what is due on several goes to the first from memory and from there to the others"""
    mesh: Mapping[str, Any] = field(default_factory=dict)
    """JSON that describes the layout of ranks; goes into the manifest"""
    num_attempts: int = 3
    """tries to write one step to one tier before it is given up, loudly"""
    backoff_s: float = 1.0
    """before the second try; doubles with each"""
    idle_limit_s: float = 300.0
    """with no trainer and nothing left to write, the keeper ends after this long and the memory is gone"""
    events: str = ""
    """file to which the keeper appends its events as JSON lines; empty: none"""

    def __post_init__(self) -> None:
        """Raises ConfigError with all that is wrong."""
        object.__setattr__(self, "tiers", tuple(self.tiers))
        problems = [
            Problem(f"{name} must be positive", got=str(value))
            for name, value in (("num_attempts", self.num_attempts), ("idle_limit_s", self.idle_limit_s))
            if value <= 0
        ]
        for tier in self.tiers:
            for name, value, low in (
                ("every", tier.every, 1),
                ("keep_last", tier.keep_last, 1),
                ("keep_every", tier.keep_every, 0),
                ("bytes_per_s", tier.bytes_per_s, 0),
            ):
                if value < low:
                    problems.append(
                        Problem(
                            f"{name} of tier {tier_name(tier)} is too small",
                            got=str(value),
                            allowed=f"{low} on",
                        )
                    )
        names = [tier_name(tier) for tier in self.tiers]
        if len(set(names)) < len(names):
            problems.append(Problem("two tiers have the same name", got=", ".join(names)))
        raise_if(problems)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return asdict(self) | {"mesh": dict(self.mesh)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "KeeperConfig":
        """The configuration that ``to_json`` wrote; raises ConfigError or TypeError for anything else."""
        tiers = tuple(TierConfig(**tier) for tier in value["tiers"])
        return cls(**{**value, "tiers": tiers})


def tier_url(tier: TierConfig, *, node_rank: int) -> str:
    """Where the tier is, seen from a node."""
    return tier.url.replace("{node}", str(node_rank))


def tier_name(tier: TierConfig) -> str:
    """How the tier is called."""
    return tier.name or tier.url
