"""The slots of one rank: what is in them, and which may be used again.

::

    FREE ── open ──▶ FILLING ── seal ──▶ SEALED ── all ranks ──▶ PROTECTED ──▶ FREE

A complete snapshot stays until every rank has a newer one. It stays longer where something else needs its memory:
tiers that it is to be written to from there, threads that are writing, and readers. With a single slot it makes room
as soon as nothing needs it, since there is no other place for the next.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from distrain.checkpoint.arena import Arena
from distrain.checkpoint.flush import SlotMemory
from distrain.checkpoint.untrusted import Json


class State(StrEnum):
    """Of a slot, in its order."""

    FREE = "FREE"
    FILLING = "FILLING"
    SEALED = "SEALED"
    PROTECTED = "PROTECTED"


@dataclass(slots=True, eq=False)
class Snapshot:
    """What is in a slot."""

    step: int
    memory: SlotMemory
    objects: Mapping[str, Json]
    is_durable: bool = False
    """whether it is to go to every tier, whatever their intervals"""
    order: int = field(default_factory=time.monotonic_ns)
    """when it was begun; steps need not grow, since a run may go back"""
    state: State = State.FILLING
    copied: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)
    """extents that a slot which streams may overwrite"""
    needs: set[int] = field(default_factory=set)
    """tiers to which it is yet to be written from memory"""
    num_flushing: int = 0
    """flushes under way"""
    num_writing: int = 0
    """these and whatever else may be using the memory"""
    num_readers: int = 0
    discarded: str = ""
    """why it is no good any more"""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """set and replaced whenever something here changes"""

    def status(self) -> dict[str, Any]:
        """For people and metrics."""
        return {
            "state": self.state.value,
            "step": self.step,
            "streams": self.memory.streams,
            "num_copied": len(self.copied),
            "num_extents": self.memory.layout.num_extents,
            "needed_by": sorted(self.needs),
            "num_readers": self.num_readers,
            "discarded": self.discarded,
        }

    def notify(self) -> None:
        """Wake who waits for a change."""
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        """Whether its memory holds all of a sealed snapshot."""
        return self.state in (State.SEALED, State.PROTECTED) and not self.memory.streams

    @property
    def is_needed(self) -> bool:
        """Whether its memory must stay as it is, for now."""
        return bool(self.needs or self.num_writing or self.num_readers)


class RankSlots:
    """One rank's arena, and what is in it; ``snapshots`` has None for a free slot."""

    def __init__(self, name: str, arena: Arena, *, rank: int, world_size: int) -> None:
        self.name, self.arena, self.rank, self.world_size = name, arena, rank, world_size
        self.snapshots: list[Snapshot | None] = [None] * arena.shape.num_slots
        self.retired = False
        """the rank has other memory now; this is for reading only"""
        self.is_there = self.has_ended = False
        """whether its trainer is connected, and whether that will save nothing more"""

    def fill(self, index: int, snapshot: Snapshot) -> None:
        """Begin a new snapshot in a free slot."""
        self.arena.label(index, None)
        self.snapshots[index] = snapshot

    def status(self) -> dict[str, Any]:
        """For people and metrics."""
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "nbytes": self.arena.shape.nbytes,
            "retired": self.retired,
            "slots": [each.status() if each else {"state": State.FREE.value} for each in self.snapshots],
        }

    def free(self, snapshot: Snapshot) -> None:
        """Forget what is in the slot."""
        index = self.snapshots.index(snapshot)
        self.arena.label(index, None)
        self.snapshots[index] = None
        snapshot.notify()

    def of_step(self, step: int) -> Snapshot | None:
        """The snapshot of ``step``."""
        return next((each for each in self.snapshots if each and each.step == step), None)

    def usable(self) -> int | None:
        """A slot that can be filled now."""
        self.sweep()
        if None in self.snapshots:
            return self.snapshots.index(None)
        only = self.snapshots[0]
        if len(self.snapshots) == 1 and only and only.state is not State.FILLING and not only.is_needed:
            self.free(only)
            return 0
        return None

    def sweep(self) -> None:
        """Free what is superseded or discarded, and not needed."""
        newest = self._newest_protected()
        for snapshot in filter(None, list(self.snapshots)):
            superseded = newest is not None and snapshot.order < newest.order
            is_over = superseded or snapshot.memory.streams or snapshot.discarded
            if is_over and snapshot.state is not State.FILLING and not snapshot.is_needed:
                self.free(snapshot)

    def victim(self) -> Snapshot | None:
        """The oldest snapshot that may be sacrificed: one that is only kept because it is not written yet."""
        newest = self._newest_protected()
        found = [
            each
            for each in self.snapshots
            if each and each.state is not State.FILLING and newest and each.order < newest.order
        ]
        return min(
            (each for each in found if not each.num_readers), key=lambda each: each.order, default=None
        )

    def _newest_protected(self) -> Snapshot | None:
        found = [each for each in self.snapshots if each and each.state is State.PROTECTED]
        return max(found, key=lambda each: each.order, default=None)
