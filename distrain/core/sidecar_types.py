"""The words of the conversation between a trainer and the keeper of its node."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .errors import DistrainError
from .wire import Header

Json = Any


class KeeperLost(DistrainError):
    """The keeper is gone or does not answer; training can go on, and another one is being looked for."""


class KeeperRefused(DistrainError):
    """The keeper understood, and says why it will not."""


class Layout(Protocol):
    """What the client needs of a ``checkpoint.layout.WriterLayout``."""

    @property
    def num_extents(self) -> int: ...
    @property
    def digest(self) -> str: ...
    def to_json(self) -> Json: ...


class Config(Protocol):
    """What the client needs of a ``checkpoint.keeper_config.KeeperConfig``."""

    def to_json(self) -> Json: ...


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """The memory of one snapshot while it is filled."""

    index: int
    step: int
    memory: memoryview
    """writable; extent i lies at ``i * STRIDE``, unless the slot streams"""
    num_extents: int
    """extents that fit; in a slot that streams they take turns: see ``KeeperClient.place``"""
    streams: bool
    """the state is larger than the slot: extents are written to disk as they fill, and memory will not have them"""
    connection: int


@dataclass(frozen=True, slots=True)
class StepStatus:
    """What the keeper knows of one step."""

    step: int
    reached: bool
    """whether it is what was waited for"""
    state: str
    """FILLING, SEALED, PROTECTED (all ranks have sealed), or GONE from memory"""
    committed: tuple[str, ...]
    """tiers on which it is committed"""
    reason: str
    """why not, if it never will be"""


@dataclass(frozen=True, slots=True)
class SealedStep:
    """A snapshot in this node's memory."""

    step: int
    protected: bool
    """every rank of the job has sealed it"""
    world_size: int
    writers: tuple[int, ...]
    """those whose bytes are on this node"""


@dataclass(frozen=True, slots=True, eq=False)
class PinnedWriter:
    """One writer's bytes of a pinned step."""

    writer: int
    layout: Json
    """for ``WriterLayout.from_json``"""
    objects: Mapping[str, Json]
    crcs: tuple[int, ...]
    memory: memoryview
    """read-only; extent i lies at ``i * STRIDE``"""


@dataclass(frozen=True, slots=True)
class Held:
    """What is in a slot, for a keeper that has to be told."""

    step: int
    layout: Layout
    objects: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a trainer is, and what it wants, as it says hello."""

    job: str
    rank: int
    local_rank: int
    world_size: int
    node_rank: int
    num_nodes: int
    slot_bytes: int
    num_slots: int
    config: Json
    pid: int = field(default_factory=os.getpid)

    def to_json(self) -> Header:
        """The fields of the message."""
        return {name: getattr(self, name) for name in self.__slots__}
