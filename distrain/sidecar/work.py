"""What a keeper is doing at the moment for its ranks: jobs on the tiers, checksums in memory, tidying up."""

import asyncio
import json
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from distrain.checkpoint.arena import SlotHeader
from distrain.checkpoint.collect import Retention, collect
from distrain.checkpoint.commit import commit
from distrain.checkpoint.flush import Identity, lower_priority
from distrain.checkpoint.record import WriterRecord
from distrain.checkpoint.untrusted import Json, canonical

from .lanes import Job, Lane
from .slots import RankSlots, Snapshot
from .sums import objects_digest, sums_of
from .terms import Message

Say = Callable[..., None]
"""``say(level, event, text, **attributes)``"""
Report = Callable[[int, Message, bytes], None]
"""tells the coordinator: world size, message, payload"""
Notify = Callable[[], None]
"""something has changed"""


class Work:
    """Jobs and tasks; all of them end by themselves, none is cancelled while a thread works for it."""

    def __init__(
        self, *, job: str, mesh: Json, lanes: Sequence[Lane], say: Say, report: Report, notify: Notify
    ) -> None:
        self._job, self._mesh, self._lanes = job, mesh, lanes
        self._say, self._report, self._notify = say, report, notify
        self._jobs: dict[tuple[int, int, int, int], Job] = {}
        """by world size, step, tier and writer"""
        self._tasks: set[asyncio.Task[None]] = set()
        self._sums = ThreadPoolExecutor(1, "sums", initializer=lower_priority)

    @property
    def busy(self) -> bool:
        """Whether something is being done."""
        return bool(self._tasks)

    def write(self, slots: RankSlots, snapshot: Snapshot, begin: Message) -> None:
        """Begin to write a snapshot from memory."""
        job = self._new_job(slots.world_size, slots.rank, begin)
        if job and not snapshot.discarded:
            snapshot.num_writing += 1
            snapshot.num_flushing += 1
            self._spawn(self._write(slots, snapshot, begin, job))

    def promote(self, world: int, rank: int, begin: Message, *, folder: str) -> None:
        """Begin to copy one writer's part from one tier to another."""
        if job := self._new_job(world, rank, begin):
            lane = self._lanes[begin["tier"]]
            copying = lane.promote(self._lanes[begin["source"]], folder, job)
            self._spawn(self._attempt(world, begin, job, copying))

    def publish(self, world: int, message: Message, payload: bytes) -> None:
        """Commit this node's part of a checkpoint on the disks of nodes; ``payload`` has the records of all."""
        self._spawn(self._publish(world, message, payload))

    def settle(self, slots: RankSlots, snapshot: Snapshot, *, at_once: bool) -> "asyncio.Task[None]":
        """Find the checksums that are missing, and note in the header that all are there.

        Unless they are needed ``at_once``, a flush under way finds them on its way.
        """
        snapshot.num_writing += 1
        return self._spawn(self._settle(slots, snapshot, at_once=at_once))

    def collect(
        self, lane: Lane, *, writers: Collection[int], pinned: Collection[int], in_flight: Collection[str]
    ) -> None:
        """Apply retention to a disk of this node."""
        keep = Retention(keep_last=lane.config.keep_last, keep_every=lane.config.keep_every)
        self._spawn(
            self._quietly(
                lane.control(collect, lane.storage, keep, pinned=pinned, in_flight=in_flight, writers=writers)
            )
        )

    def stop(self, world: int, step: int, *, writer: int) -> None:
        """A snapshot is no good any more: stop writing it; what is prepared is the coordinator's to decide on."""
        for key, job in self._jobs.items():
            if key[:2] == (world, step) and job.writer == writer and not job.prepared:
                job.stopped = True

    def abandon(self, world: int, step: int, tier: int, *, attempt: str) -> None:
        """The attempt came to nothing: stop it, and delete what it has left."""
        for key, job in list(self._jobs.items()):
            if key[:3] == (world, step, tier) and job.attempt == attempt:
                job.stopped = True
                del self._jobs[key]
                if job.prepared:
                    self._spawn(self._quietly(self._lanes[tier].discard(step, job)))

    def finish(self, world: int, step: int, tier: int) -> None:
        """The attempt has become a checkpoint."""
        for key in [key for key in self._jobs if key[:3] == (world, step, tier)]:
            del self._jobs[key]

    def forget(self) -> None:
        """Nobody will commit what is being written; what is prepared may just have been committed, and stays."""
        for job in self._jobs.values():
            job.stopped = job.stopped or not job.prepared
        self._jobs.clear()

    def close(self) -> None:
        """Let the thread end."""
        self._sums.shutdown(wait=False)

    def header(self, slots: RankSlots, snapshot: Snapshot, *, sums: int | None) -> SlotHeader:
        """What the header of a sealed snapshot says."""
        return SlotHeader(
            job=self._job,
            step=snapshot.step,
            writer=slots.rank,
            world_size=slots.world_size,
            layout_digest=snapshot.memory.layout.digest,
            objects_digest=objects_digest(snapshot.objects),
            sums=sums,
        )

    def _new_job(self, world: int, rank: int, begin: Message) -> Job | None:
        """A new job; None if it runs already."""
        key = world, begin["step"], begin["tier"], rank
        if (running := self._jobs.get(key)) and running.attempt == begin["attempt"]:
            return None
        job = self._jobs[key] = Job(begin["attempt"], rank)
        return job

    async def _write(self, slots: RankSlots, snapshot: Snapshot, begin: Message, job: Job) -> None:
        lane = self._lanes[begin["tier"]]
        identity = Identity(
            job=self._job, step=snapshot.step, world_size=slots.world_size, objects=snapshot.objects
        )
        try:
            await self._attempt(slots.world_size, begin, job, lane.flush(snapshot, identity, job))
        finally:
            snapshot.num_writing -= 1
            snapshot.num_flushing -= 1
            snapshot.notify()

    async def _attempt(
        self, world: int, begin: Message, job: Job, work: Coroutine[Any, Any, WriterRecord | None]
    ) -> None:
        """Carry out one job and tell how it ended."""
        lane, step = self._lanes[begin["tier"]], begin["step"]
        report = {key: begin[key] for key in ("step", "tier", "attempt")} | {"writer": job.writer}
        try:
            record = await work
        except Exception as error:
            await self._quietly(lane.discard(step, job))
            self._report(world, {"do": "failed", "reason": one_line(error), "final": False, **report}, b"")
            return
        if record is None or job.stopped:
            await self._quietly(lane.discard(step, job))
            return
        job.prepared = True
        lane.counters.num_prepared += 1
        payload = b"" if lane.config.shared else canonical(record.to_json())
        self._report(world, {"do": "prepared", "digest": record.digest, **report}, payload)

    async def _publish(self, world: int, message: Message, payload: bytes) -> None:
        lane = self._lanes[message["tier"]]
        step, attempt = message["step"], message["attempt"]
        reply = {"do": "published", "tier": message["tier"], "step": step, "attempt": attempt}
        try:
            records = [WriterRecord.from_json(each) for each in json.loads(payload)]
            folder = await lane.control(commit, lane.storage, step, attempt, mesh=self._mesh, records=records)
            self._report(world, {**reply, "folder": folder, "reason": ""}, b"")
        except Exception as error:
            self._report(world, {**reply, "folder": "", "reason": one_line(error)}, b"")

    async def _settle(self, slots: RankSlots, snapshot: Snapshot, *, at_once: bool) -> None:
        memory = snapshot.memory
        loop = asyncio.get_running_loop()
        try:
            while snapshot.num_flushing and not at_once:
                await snapshot.changed.wait()
            for extent in range(memory.layout.num_extents):
                if extent not in memory.crcs:
                    await loop.run_in_executor(self._sums, memory.sealed, extent)
            if snapshot in slots.snapshots:
                header = self.header(slots, snapshot, sums=sums_of(memory))
                slots.arena.label(slots.snapshots.index(snapshot), header)
        finally:
            snapshot.num_writing -= 1

    async def _quietly(self, work: Any) -> None:
        """Tidying up: what fails is said, and done another time."""
        try:
            await work
        except Exception as error:
            self._say("warning", "clean_up_failed", one_line(error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._say("error", "internal_error", one_line(error))
        self._notify()


def one_line(error: BaseException) -> str:
    """What went wrong, for a message."""
    return f"{type(error).__name__}: {error}".replace("\nerror: ", " ").replace("\n", "; ")[:500]
