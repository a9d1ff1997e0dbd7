"""A node's part in the agreement: tells the coordinator what its ranks do, and does what it is told.

Everything here runs in the keeper's event loop; what blocks goes to the lanes' threads.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from distrain.checkpoint.arena import SlotHeader
from distrain.checkpoint.collect import Retention, collect
from distrain.checkpoint.commit import commit, working_folder
from distrain.checkpoint.flush import Identity, lower_priority
from distrain.checkpoint.record import WriterRecord
from distrain.checkpoint.untrusted import Json, canonical
from distrain.core.wire import Frame

from .agreement import MEMORY, Message
from .lanes import Job, Lane
from .slots import RankSlots, Snapshot, State
from .sums import objects_digest, sums_of

REMEMBERED_STEPS = 256

Say = Callable[..., None]
"""``say(level, event, text, **attributes)``"""


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
    """the coordinator has been told of it, and has yet to say so"""
    committed: dict[int, str] = field(default_factory=dict)
    """folder by tier"""
    failed: dict[int, str] = field(default_factory=dict)
    """reason by tier that was given up"""
    begun: dict[int, Message] = field(default_factory=dict)
    """attempts under way by tier"""
    lost: str = ""

    @property
    def outstanding(self) -> set[int]:
        """Tiers that it has yet to reach."""
        return (self.due or set()) - self.committed.keys() - self.failed.keys() if not self.lost else set()


class Member:
    """All ranks of this node, those of earlier world sizes included."""

    def __init__(self, *, job: str, mesh: Json, lanes: Sequence[Lane], say: Say) -> None:
        self.ranks: list[RankSlots] = []
        self.steps: dict[tuple[int, int], Step] = {}
        """by world size and step"""
        self.changed = asyncio.Event()
        """set and replaced whenever something here changes"""
        self._job, self._mesh, self._lanes, self._say = job, mesh, lanes, say
        self._link: Link | None = None
        self._jobs: dict[tuple[int, int, int, int], Job] = {}
        """by world size, step, tier and writer"""
        self._tasks: set[asyncio.Task[None]] = set()
        self._sums = ThreadPoolExecutor(1, "sums", initializer=lower_priority)

    # -- what ranks do

    def arrive(self, slots: RankSlots) -> None:
        """A rank is here, with what it has in memory."""
        if slots not in self.ranks:
            self.ranks.append(slots)
        self._introduce(slots)

    def opened(self, slots: RankSlots, snapshot: Snapshot, *, durable: bool) -> None:
        """A rank fills a slot."""
        key = slots.world_size, snapshot.step
        if (known := self.steps.get(key)) and (known.committed or known.lost or known.failed):
            del self.steps[key]  # of another snapshot of the same step
        self._tell(slots, snapshot, do="opened", streams=snapshot.memory.streams, durable=durable)
        known = self._step(*key)
        known.is_undecided = known.due is None
        snapshot.needs |= known.outstanding
        for message in list(known.begun.values()):
            if message["source"] == MEMORY:
                self._write(slots, snapshot, message)

    def seal(self, slots: RankSlots, snapshot: Snapshot) -> None:
        """A snapshot is complete."""
        snapshot.state = State.SEALED
        if not snapshot.memory.streams:
            slots.arena.label(slots.snapshots.index(snapshot), self._header(slots, snapshot, sums=None))
            self._spawn(self.settle(slots, snapshot))
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

    def leave(self, slots: RankSlots) -> None:
        """A rank is gone; what it was filling is lost."""
        for snapshot in filter(None, list(slots.snapshots)):
            if snapshot.state is State.FILLING:
                self.give_up(slots, snapshot, "the trainer is gone")
        self._send(slots.world_size, {"do": "left", "rank": slots.rank})
        self.notify()

    @property
    def busy(self) -> bool:
        """Whether anything is being written, or will be as things stand."""
        waiting = self._link is not None and any(s.needs for r in self.ranks for s in r.snapshots if s)
        return bool(
            waiting or self._tasks or (self._link and any(s.outstanding for s in self.steps.values()))
        )

    @property
    def is_linked(self) -> bool:
        """Whether there is a coordinator."""
        return self._link is not None

    def tier_name(self, index: int) -> str:
        """How people call a tier."""
        return self._lanes[index].name

    def tier_index(self, name: str) -> int:
        """Which tier is called so; -1 if none is."""
        return next((lane.index for lane in self._lanes if lane.name == name), -1)

    def complete(self, step: int) -> list[tuple[RankSlots, Snapshot]]:
        """What this node's memory has of ``step``, of the world size that came last."""
        found = [
            (slots, each)
            for slots in self.ranks
            for each in filter(None, slots.snapshots)
            if each.step == step and each.is_complete and not each.discarded
        ]
        newest = max((each.order for _, each in found), default=0)
        world = next((slots.world_size for slots, each in found if each.order == newest), 0)
        return [(slots, each) for slots, each in found if slots.world_size == world]

    def sealed_steps(self) -> list[Message]:
        """What can be pinned, newest first."""
        steps = {each.step: each.order for slots in self.ranks for each in slots.snapshots if each}
        rows = []
        for step in sorted(steps, key=lambda step: -steps[step]):
            if found := self.complete(step):
                protected = all(each.state is State.PROTECTED for _, each in found)
                writers = sorted(slots.rank for slots, _ in found)
                world = found[0][0].world_size
                rows.append({"step": step, "protected": protected, "world_size": world, "writers": writers})
        return rows

    def describe(self, found: Sequence[tuple[RankSlots, Snapshot]]) -> Frame:
        """Where a pinned step lies, for whoever reads it."""
        rows = [
            {
                "arena": slots.name,
                "writer": slots.rank,
                "layout": each.memory.layout.to_json(),
                "objects": dict(each.objects),
                "crcs": [each.memory.crcs[i] for i in range(each.memory.layout.num_extents)],
                "start": slots.arena.start(slots.snapshots.index(each)),
                "nbytes": each.memory.layout.slot_bytes,
            }
            for slots, each in found
        ]
        return Frame({}, canonical(rows))

    def pinned(self, tier: int) -> set[int]:
        """Steps on ``tier`` that others are still to be filled from."""
        return {
            step for (_, step), known in self.steps.items() if tier in known.committed and known.outstanding
        }

    def notify(self) -> None:
        """Something has changed: free what can be, wake who waits."""
        for slots in list(self.ranks):
            slots.sweep()
            if slots.retired and not any(slots.snapshots):
                self.ranks.remove(slots)
                slots.arena.close()
        self.changed.set()
        self.changed = asyncio.Event()

    # -- the coordinator

    def link(self, link: Link) -> None:
        """A coordinator is there: tell it everything."""
        self._link = link
        for slots in self.ranks:
            self._introduce(slots)

    def unlink(self, reason: str) -> None:
        """The coordinator is gone. What is being written would never be committed; the next will begin anew."""
        self._link = None
        for key, job in list(self._jobs.items()):
            if not job.prepared:
                job.stopped = True
            del self._jobs[key]
        for known in self.steps.values():
            known.begun.clear()
            known.due, known.is_undecided = set(known.committed) | set(known.failed), False
        for slots in self.ranks:
            for snapshot in filter(None, slots.snapshots):
                snapshot.needs.clear()
                snapshot.notify()
        self._say("warning", "coordinator_lost", f"no connection to the coordinator: {reason}")
        self.notify()

    def hear(self, message: Message, payload: bytes = b"") -> None:
        """Do what the coordinator says."""
        getattr(self, f"_on_{message['do']}")(message["world"], message, payload)
        self.notify()

    def _on_due(self, world: int, message: Message, _payload: bytes) -> None:
        key = world, message["step"]
        if message["is_first"]:
            self.steps.pop(key, None)
        known = self._step(*key)
        known.due, known.is_undecided = set(message["tiers"]), False
        for _, snapshot in self._snapshots(*key):
            if not known.committed:
                snapshot.needs |= known.outstanding

    def _on_begin(self, world: int, message: Message, _payload: bytes) -> None:
        step = message["step"]
        self._step(world, step).begun[message["tier"]] = message
        if message["source"] == MEMORY:
            for slots, snapshot in self._snapshots(world, step):
                self._write(slots, snapshot, message)
        else:
            for rank in {slots.rank for slots in self.ranks if slots.world_size == world}:
                self._promote(world, rank, message)

    def _on_protected(self, world: int, message: Message, _payload: bytes) -> None:
        orders = dict(map(tuple, message["snapshots"]))
        for slots, snapshot in self._snapshots(world, message["step"]):
            if orders.get(slots.rank) == snapshot.order and snapshot.state is State.SEALED:
                snapshot.state = State.PROTECTED
                snapshot.notify()
        for slots in [each for each in self.ranks if each.world_size != world or each.retired]:
            for old in [each for each in slots.snapshots if each and not each.is_needed]:
                self._discard(slots, old, "superseded")

    def _on_abandon(self, world: int, message: Message, _payload: bytes) -> None:
        step, tier, again = message["step"], message["tier"], message["again"]
        known = self._step(world, step)
        lane = self._lanes[tier]
        if (begun := known.begun.get(tier)) and begun["attempt"] == message["attempt"]:
            del known.begun[tier]
        lane.counters.num_failed += 1
        lane.counters.last_error = message["reason"]
        if not again:
            known.failed[tier] = message["reason"]
            lane.counters.num_given_up += 1
        what = "will be tried again" if again else "is given up"
        self._say(
            "warning" if again else "error",
            "flush_failed",
            f"step {step} to {lane.name} {what}: {message['reason']}",
            step=step,
            tier=lane.name,
            again=again,
        )
        for slots, snapshot in self._snapshots(world, step):
            if not again:
                snapshot.needs.discard(tier)
            snapshot.notify()
            if snapshot.memory.streams and not again:
                self._discard(slots, snapshot, message["reason"])
        for key, job in list(self._jobs.items()):
            if key[:3] == (world, step, tier) and job.attempt == message["attempt"]:
                job.stopped = True
                del self._jobs[key]
                if job.prepared:
                    self._spawn(self._quietly(lane.discard(step, job)))

    def _on_committed(self, world: int, message: Message, _payload: bytes) -> None:
        step, tier = message["step"], message["tier"]
        known = self._step(world, step)
        known.committed[tier] = message["folder"]
        known.begun.pop(tier, None)
        lane = self._lanes[tier]
        lane.counters.num_committed += 1
        lane.counters.last_committed = step
        for key in [key for key in self._jobs if key[:3] == (world, step, tier)]:
            del self._jobs[key]
        for _, snapshot in self._snapshots(world, step):
            snapshot.needs.clear()  # other tiers are filled from this one
        self._say("info", "committed", f"step {step} is on {lane.name}", step=step, tier=lane.name)
        if not lane.config.shared:
            self._spawn(self._collect(lane))

    def _on_lost(self, world: int, message: Message, _payload: bytes) -> None:
        step, reason = message["step"], message["reason"]
        known = self._step(world, step)
        known.lost, known.begun, known.is_undecided = reason, {}, False
        orders = dict(map(tuple, message["snapshots"]))
        for slots, snapshot in self._snapshots(world, step):
            if orders.get(slots.rank) == snapshot.order:
                self._discard(slots, snapshot, reason)
        self._say("warning", "step_lost", f"step {step} will not be complete: {reason}", step=step)

    def _on_publish(self, world: int, message: Message, payload: bytes) -> None:
        """All writers of all nodes have prepared on the nodes' own disks: each node commits its part."""
        self._spawn(self._publish(world, message, payload))

    async def _publish(self, world: int, message: Message, payload: bytes) -> None:
        lane = self._lanes[message["tier"]]
        reply = {"tier": message["tier"], "step": message["step"], "attempt": message["attempt"]}
        try:
            records = [WriterRecord.from_json(each) for each in json.loads(payload)]
            folder = await lane.control(
                commit, lane.storage, message["step"], message["attempt"], mesh=self._mesh, records=records
            )
            self._send(world, {"do": "published", "folder": folder, "reason": "", **reply})
        except Exception as error:
            self._send(world, {"do": "published", "folder": "", "reason": one_line(error), **reply})

    # -- work

    def _write(self, slots: RankSlots, snapshot: Snapshot, begin: Message) -> None:
        """Begin to write a snapshot from memory."""
        job = self._job_of(slots.world_size, slots.rank, begin)
        if job and not snapshot.discarded:
            snapshot.num_writing += 1
            self._spawn(self._write_all(slots, snapshot, begin, job))

    async def _write_all(self, slots: RankSlots, snapshot: Snapshot, begin: Message, job: Job) -> None:
        lane = self._lanes[begin["tier"]]
        identity = Identity(
            job=self._job, step=snapshot.step, world_size=slots.world_size, objects=snapshot.objects
        )
        try:
            await self._attempt(slots.world_size, begin, job, lane, lane.flush(snapshot, identity, job))
        finally:
            snapshot.num_writing -= 1
            snapshot.notify()
            self.notify()

    def _promote(self, world: int, rank: int, begin: Message) -> None:
        """Begin to copy from one tier to another."""
        known, source = self._step(world, begin["step"]), begin["source"]
        job = self._job_of(world, rank, begin)
        if job and source in known.committed:
            lane = self._lanes[begin["tier"]]
            work = lane.promote(self._lanes[source], known.committed[source], job)
            self._spawn(self._attempt(world, begin, job, lane, work))

    def _job_of(self, world: int, rank: int, begin: Message) -> Job | None:
        """A new job; None if it runs already."""
        key = world, begin["step"], begin["tier"], rank
        if (running := self._jobs.get(key)) and running.attempt == begin["attempt"]:
            return None
        job = self._jobs[key] = Job(begin["attempt"], rank)
        return job

    async def _attempt(self, world: int, begin: Message, job: Job, lane: Lane, work: Any) -> None:
        """Carry out one job and tell how it ended."""
        report = {key: begin[key] for key in ("step", "tier", "attempt")} | {"writer": job.writer}
        try:
            record = await work
        except Exception as error:
            if not job.prepared:
                await self._quietly(lane.discard(begin["step"], job))
            self._send(world, {"do": "failed", "reason": one_line(error), "final": False, **report})
            return
        if record is None or job.stopped:
            await self._quietly(lane.discard(begin["step"], job))
            return
        job.prepared = True
        lane.counters.num_prepared += 1
        payload = b"" if lane.config.shared else canonical(record.to_json())
        self._send(world, {"do": "prepared", "digest": record.digest, **report}, payload)

    async def settle(self, slots: RankSlots, snapshot: Snapshot) -> None:
        """Find the checksums of all extents that have none yet, and note in the header that they are there."""
        memory = snapshot.memory
        snapshot.num_writing += 1
        try:
            loop = asyncio.get_running_loop()
            for extent in range(memory.layout.num_extents):
                if extent not in memory.crcs:
                    await loop.run_in_executor(self._sums, memory.sealed, extent)
            if snapshot in slots.snapshots:
                header = self._header(slots, snapshot, sums=sums_of(memory))
                slots.arena.label(slots.snapshots.index(snapshot), header)
        finally:
            snapshot.num_writing -= 1
            self.notify()

    async def _collect(self, lane: Lane) -> None:
        """Apply retention to a disk of this node."""
        keep = Retention(keep_last=lane.config.keep_last, keep_every=lane.config.keep_every)
        writers = sorted({slots.rank for slots in self.ranks})
        in_flight = [
            working_folder(lane.storage, step, begun["attempt"])
            for (_, step), known in self.steps.items()
            if (begun := known.begun.get(lane.index))
        ]
        await self._quietly(
            lane.control(
                collect,
                lane.storage,
                keep,
                pinned=self.pinned(lane.index),
                in_flight=in_flight,
                writers=writers,
            )
        )

    async def _quietly(self, work: Any) -> None:
        """Tidying up: what fails is said, and done another time."""
        try:
            await work
        except Exception as error:
            self._say("warning", "clean_up_failed", one_line(error))

    # -- helpers

    def _introduce(self, slots: RankSlots) -> None:
        """Tell the coordinator of a rank and what it has."""
        held = sorted(filter(None, slots.snapshots), key=lambda each: each.order)
        if slots.retired:
            return
        holds = [[each.step, each.order] for each in held if each.is_complete and not each.discarded]
        self._send(slots.world_size, {"do": "rank", "rank": slots.rank, "holds": holds})
        for snapshot in held:
            if snapshot.state is State.FILLING and not snapshot.discarded:
                streams = snapshot.memory.streams
                self._tell(slots, snapshot, do="opened", streams=streams, durable=False)

    def _discard(self, slots: RankSlots, snapshot: Snapshot, reason: str) -> None:
        snapshot.discarded = snapshot.discarded or reason
        snapshot.needs.clear()
        for (world, step, _, writer), job in list(self._jobs.items()):
            if (world, step, writer) == (slots.world_size, snapshot.step, slots.rank) and not job.prepared:
                job.stopped = True
        snapshot.notify()
        slots.sweep()

    def _snapshots(self, world: int, step: int) -> Iterator[tuple[RankSlots, Snapshot]]:
        for slots in self.ranks:
            if slots.world_size == world:
                for snapshot in list(slots.snapshots):
                    if snapshot and snapshot.step == step and not snapshot.discarded:
                        yield slots, snapshot

    def _step(self, world: int, step: int) -> Step:
        known = self.steps.setdefault((world, step), Step())
        for key in list(self.steps)[:-REMEMBERED_STEPS]:
            if not self.steps[key].outstanding:
                del self.steps[key]
        return known

    def _header(self, slots: RankSlots, snapshot: Snapshot, *, sums: int | None) -> SlotHeader:
        return SlotHeader(
            job=self._job,
            step=snapshot.step,
            writer=slots.rank,
            world_size=slots.world_size,
            layout_digest=snapshot.memory.layout.digest,
            objects_digest=objects_digest(snapshot.objects),
            sums=sums,
        )

    def _tell(self, slots: RankSlots, snapshot: Snapshot, **message: Any) -> None:
        of = {"rank": slots.rank, "step": snapshot.step, "order": snapshot.order}
        self._send(slots.world_size, {**of, **message})

    def _send(self, world: int, message: Message, payload: bytes = b"") -> None:
        if self._link:
            self._link.send({"world": world, **message}, payload)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._say("error", "internal_error", f"{type(error).__name__}: {error}")
        self.notify()


def one_line(error: BaseException) -> str:
    """What went wrong, for a message."""
    return f"{type(error).__name__}: {error}".replace("\nerror: ", " ").replace("\n", "; ")[:500]
