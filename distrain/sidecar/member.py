"""A node's part in the agreement: tells the coordinator what its ranks do, and does what it is told."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from distrain.checkpoint.commit import working_folder
from distrain.checkpoint.untrusted import Json

from .lanes import Lane
from .shelf import Shelf
from .slots import RankSlots, Snapshot, State
from .terms import MEMORY, Message
from .work import Say, Work

REMEMBERED_STEPS = 256


class Link(Protocol):
    """The way to the coordinator."""

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Send; if the link breaks, ``Member.unlink`` is called."""


@dataclass(slots=True)
class Step:
    """What this node knows of one step."""

    due: set[int] | None = None
    """tiers that it is to reach, once the coordinator has said so"""
    is_undecided: bool = False
    """the coordinator has been told of what is in memory, and has yet to say so"""
    committed: dict[int, str] = field(default_factory=dict)
    """folder by tier"""
    failed: dict[int, str] = field(default_factory=dict)
    """reason by tier that was given up"""
    begun: dict[int, Message] = field(default_factory=dict)
    """attempts under way by tier"""
    lost: str = ""
    """why it will not be complete"""

    @property
    def outstanding(self) -> set[int]:
        """Tiers that it has yet to reach."""
        return (self.due or set()) - self.committed.keys() - self.failed.keys() if not self.lost else set()


class Member:
    """All of this runs in the keeper's event loop; what takes time is ``Work``."""

    def __init__(self, *, job: str, mesh: Json, lanes: Sequence[Lane], shelf: Shelf, say: Say) -> None:
        self.shelf = shelf
        self.steps: dict[tuple[int, int], Step] = {}
        """by world size and step"""
        self.changed = asyncio.Event()
        """set and replaced whenever something here changes"""
        self.work = Work(job=job, mesh=mesh, lanes=lanes, say=say, report=self._send, notify=self.notify)
        self._lanes, self._say = lanes, say
        self._link: Link | None = None

    # -- what ranks do

    def arrive(self, slots: RankSlots) -> None:
        """A rank is here, with what it has in memory."""
        slots.is_there, slots.has_ended = True, False
        if slots not in self.shelf.ranks:
            self.shelf.ranks.append(slots)
        self._introduce(slots)

    def opened(self, slots: RankSlots, snapshot: Snapshot) -> None:
        """A rank fills a slot."""
        key = slots.world_size, snapshot.step
        if (known := self.steps.get(key)) and (known.committed or known.lost or known.failed):
            del self.steps[key]  # of another snapshot of the same step
        known = self._step(*key)
        known.is_undecided = known.due is None
        snapshot.needs |= known.outstanding
        self._tell_opened(slots, snapshot)
        for message in list(known.begun.values()):
            if message["source"] == MEMORY:
                self.work.write(slots, snapshot, message)

    def seal(self, slots: RankSlots, snapshot: Snapshot) -> None:
        """A snapshot is complete."""
        snapshot.state = State.SEALED
        if not snapshot.memory.streams:
            index = slots.snapshots.index(snapshot)
            slots.arena.label(index, self.work.header(slots, snapshot, sums=None))
            self.work.settle(slots, snapshot, at_once=False)
        snapshot.notify()
        self._tell(slots, snapshot, do="sealed")
        self.notify()

    def give_up(self, slots: RankSlots, snapshot: Snapshot, reason: str) -> None:
        """A snapshot is no good; its slot is free once nobody uses it."""
        if snapshot.state is State.FILLING:
            snapshot.state = State.SEALED
        self._discard(slots, snapshot, reason)
        self.skip(slots, snapshot.step, reason)

    def skip(self, slots: RankSlots, step: int, reason: str) -> None:
        """A rank will not save ``step``."""
        self._send(slots.world_size, {"do": "gone", "rank": slots.rank, "step": step, "reason": reason})
        self.notify()

    def end(self, slots: RankSlots) -> None:
        """A rank will save nothing more."""
        slots.has_ended = True
        self._send(slots.world_size, {"do": "ends", "rank": slots.rank})

    def leave(self, slots: RankSlots) -> None:
        """A rank is gone; what it was filling is lost."""
        slots.is_there = slots.has_ended = False
        for snapshot in filter(None, list(slots.snapshots)):
            if snapshot.state is State.FILLING:
                self.give_up(slots, snapshot, "the trainer is gone")
        self._send(slots.world_size, {"do": "left", "rank": slots.rank})
        self.notify()

    # -- what is to be known

    @property
    def busy(self) -> bool:
        """Whether anything is being written, or will be as things stand."""
        steps = self.steps.items() if self._link else ()
        return self.work.busy or any(
            known.outstanding or (known.is_undecided and any(self.shelf.snapshots(*key)))
            for key, known in steps
        )

    @property
    def is_linked(self) -> bool:
        """Whether there is a coordinator."""
        return self._link is not None

    @property
    def is_stranded(self) -> bool:
        """Whether memory holds what should be on disk, and there is no coordinator to see to it."""
        if self._link or not self._lanes:
            return False
        held = [
            (slots, each)
            for slots in self.shelf.ranks
            for each in slots.snapshots
            if each and each.is_complete
        ]
        known = (self.steps.get((slots.world_size, each.step)) for slots, each in held)
        return any(each is None or not each.committed for each in known)

    def tier_name(self, index: int) -> str:
        """How people call a tier."""
        return self._lanes[index].name

    def tier_index(self, name: str) -> int:
        """Which tier is called so; -1 if none is."""
        return next((lane.index for lane in self._lanes if lane.name == name), -1)

    def notify(self) -> None:
        """Something has changed: free what can be, wake who waits."""
        self.shelf.sweep()
        self.changed.set()
        self.changed = asyncio.Event()

    # -- the coordinator

    def link(self, link: Link) -> None:
        """A coordinator is there: tell it everything."""
        self._link = link
        for slots in self.shelf.ranks:
            self._introduce(slots)
        for slots in self.shelf.ranks:
            if slots.has_ended and not slots.retired:
                self.end(slots)

    def unlink(self, reason: str) -> None:
        """The coordinator is gone. What is being written would never be committed; the next one begins anew."""
        self._link = None
        self.work.forget()
        for (world, step), known in self.steps.items():
            known.begun.clear()
            is_held = any(self.shelf.snapshots(world, step))
            known.due = None if is_held else known.committed.keys() | known.failed.keys()
            known.is_undecided = False
        for slots in self.shelf.ranks:
            for snapshot in filter(None, slots.snapshots):
                snapshot.needs.clear()
                snapshot.notify()
        self._say("warning", "coordinator_lost", f"no connection to the coordinator: {reason}")
        self.notify()

    def hear(self, message: Message, payload: bytes = b"") -> None:
        """Do what the coordinator says."""
        if message["do"] == "publish":
            self.work.publish(message["world"], message, payload)
        else:
            getattr(self, f"_on_{message['do']}")(message["world"], message)
        self.notify()

    def _on_due(self, world: int, message: Message) -> None:
        step = message["step"]
        if message["is_first"]:
            self.steps.pop((world, step), None)
        known = self._step(world, step)
        known.due, known.is_undecided = set(message["tiers"]), False
        for _, snapshot in self.shelf.snapshots(world, step):
            if not known.committed:
                snapshot.needs |= known.outstanding

    def _on_begin(self, world: int, message: Message) -> None:
        step, source = message["step"], message["source"]
        known = self._step(world, step)
        known.begun[message["tier"]] = message
        if source == MEMORY:
            for slots, snapshot in self.shelf.snapshots(world, step):
                self.work.write(slots, snapshot, message)
        elif source in known.committed:
            for writer in self.shelf.writers(world):
                self.work.promote(world, writer, message, folder=known.committed[source])

    def _on_protected(self, world: int, message: Message) -> None:
        orders = dict(map(tuple, message["snapshots"]))
        for slots, snapshot in self.shelf.snapshots(world, message["step"]):
            if orders.get(slots.rank) == snapshot.order and snapshot.state is State.SEALED:
                snapshot.state = State.PROTECTED
                snapshot.notify()
        for slots, snapshot in list(self.shelf.outdated(world)):
            self._discard(slots, snapshot, "superseded")

    def _on_abandon(self, world: int, message: Message) -> None:
        step, tier, again, reason = message["step"], message["tier"], message["again"], message["reason"]
        known, lane = self._step(world, step), self._lanes[tier]
        if known.begun.get(tier, {}).get("attempt") == message["attempt"]:
            del known.begun[tier]
        lane.counters.num_failed += 1
        lane.counters.last_error = reason
        if not again:
            known.failed[tier] = reason
            lane.counters.num_given_up += 1
        for slots, snapshot in self.shelf.snapshots(world, step):
            if not again:
                snapshot.needs.discard(tier)
                if snapshot.memory.streams:
                    self._discard(slots, snapshot, reason)
            snapshot.notify()
        self.work.abandon(world, step, tier, attempt=message["attempt"])
        what = f"step {step} to {lane.name} {'will be tried again' if again else 'is given up'}: {reason}"
        self._say(
            "warning" if again else "error", "flush_failed", what, step=step, tier=lane.name, again=again
        )

    def _on_committed(self, world: int, message: Message) -> None:
        step, tier = message["step"], message["tier"]
        known, lane = self._step(world, step), self._lanes[tier]
        known.committed[tier] = message["folder"]
        known.begun.pop(tier, None)
        lane.counters.num_committed += 1
        lane.counters.last_committed = step
        self.work.finish(world, step, tier)
        for _, snapshot in self.shelf.snapshots(world, step):
            snapshot.needs.clear()  # other tiers are filled from this one
        self._say("info", "committed", f"step {step} is on {lane.name}", step=step, tier=lane.name)
        if not lane.config.shared:
            self._collect(world, lane)

    def _on_lost(self, world: int, message: Message) -> None:
        step, reason = message["step"], message["reason"]
        known = self._step(world, step)
        known.lost, known.begun, known.is_undecided = reason, {}, False
        orders = dict(map(tuple, message["snapshots"]))
        for slots, snapshot in self.shelf.snapshots(world, step):
            if orders.get(slots.rank) == snapshot.order:
                self._discard(slots, snapshot, reason)
        if not known.committed:
            self._say("warning", "step_lost", f"step {step} will not be complete: {reason}", step=step)

    # -- helpers

    def _collect(self, world: int, lane: Lane) -> None:
        pinned = {
            n for (_, n), known in self.steps.items() if lane.index in known.committed and known.outstanding
        }
        in_flight = [
            working_folder(lane.storage, step, begun["attempt"])
            for (_, step), known in self.steps.items()
            if (begun := known.begun.get(lane.index))
        ]
        self.work.collect(lane, writers=self.shelf.writers(world), pinned=pinned, in_flight=in_flight)

    def _introduce(self, slots: RankSlots) -> None:
        """Tell the coordinator of a rank and what it has."""
        if slots.retired:
            return
        held = sorted(filter(None, slots.snapshots), key=lambda each: each.order)
        good = [each for each in held if not each.discarded]
        holds = [[each.step, each.order] for each in good if each.is_complete]
        filling = [each for each in good if each.state is State.FILLING]
        fills = [[each.step, each.order] for each in filling]
        for snapshot in good:
            known = self._step(slots.world_size, snapshot.step)
            known.is_undecided = known.due is None
        here = {"rank": slots.rank, "is_there": slots.is_there, "holds": holds, "fills": fills}
        self._send(slots.world_size, {"do": "rank", **here})
        for snapshot in filling:
            self._tell_opened(slots, snapshot)

    def _discard(self, slots: RankSlots, snapshot: Snapshot, reason: str) -> None:
        snapshot.discarded = snapshot.discarded or reason
        snapshot.needs.clear()
        self.work.stop(slots.world_size, snapshot.step, writer=slots.rank)
        snapshot.notify()

    def _step(self, world: int, step: int) -> Step:
        known = self.steps.setdefault((world, step), Step())
        for key in list(self.steps)[:-REMEMBERED_STEPS]:
            if not self.steps[key].outstanding and not self.steps[key].is_undecided:
                del self.steps[key]
        return known

    def _tell_opened(self, slots: RankSlots, snapshot: Snapshot) -> None:
        streams, durable = snapshot.memory.streams, snapshot.is_durable
        self._tell(slots, snapshot, do="opened", streams=streams, durable=durable)

    def _tell(self, slots: RankSlots, snapshot: Snapshot, **message: Any) -> None:
        of = {"rank": slots.rank, "step": snapshot.step, "order": snapshot.order}
        self._send(slots.world_size, {**of, **message})

    def _send(self, world: int, message: Message, payload: bytes = b"") -> None:
        if self._link:
            self._link.send({"world": world, **message}, payload)
