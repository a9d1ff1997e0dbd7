"""One lane a tier: its storage, its threads, and the writing of snapshots to it.

A tier that hangs holds up its own lane and nothing else. Threads cannot be interrupted, so whatever runs there is left
to end by itself and asked in between whether to go on.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, ParamSpec, TypeVar

from distrain.checkpoint.commit import working_folder
from distrain.checkpoint.flush import Flush, Identity, Throttle, lower_priority, promote
from distrain.checkpoint.keeper_config import TierConfig, tier_name, tier_url
from distrain.checkpoint.layout import EXTENT_BYTES
from distrain.checkpoint.record import WriterRecord
from distrain.checkpoint.tiers import open_storage

from .slots import Snapshot, State

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(slots=True)
class Counters:
    """What a lane has done so far."""

    bytes_written: int = 0
    num_prepared: int = 0
    num_committed: int = 0
    num_failed: int = 0
    num_given_up: int = 0
    last_committed: int = -1
    last_flush_s: float = 0.0
    last_error: str = ""


@dataclass(slots=True, eq=False)
class Job:
    """One writer's part of one attempt."""

    attempt: str
    writer: int
    stopped: bool = False
    prepared: bool = False


class Lane:
    """The way to one tier."""

    def __init__(self, index: int, config: TierConfig, *, node_rank: int, num_threads: int) -> None:
        self.index, self.config, self.name = index, config, tier_name(config)
        self.storage = open_storage(tier_url(config, node_rank=node_rank))
        self.counters = Counters()
        self._num_threads = num_threads
        self._throttle = Throttle(config.bytes_per_s)
        self._pool = ThreadPoolExecutor(num_threads, f"flush-{index}", initializer=lower_priority)
        self._control = ThreadPoolExecutor(1, f"commit-{index}")

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Call on one of the flushing threads."""
        return _run(self._pool, lambda: function(*args, **kwargs))

    def control(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Call on the thread for commits, which is not held up by bulk data."""
        return _run(self._control, lambda: function(*args, **kwargs))

    def status(self) -> dict[str, Any]:
        """Counters for people and metrics."""
        return {"name": self.name, "url": self.config.url, **asdict(self.counters)}

    def close(self) -> None:
        """Let the threads end when they have nothing left to do."""
        self._pool.shutdown(wait=False)
        self._control.shutdown(wait=False)

    async def flush(self, snapshot: Snapshot, identity: Identity, job: Job) -> WriterRecord | None:
        """Write a snapshot from memory, extents as they come; None if the job was stopped. StorageError."""
        start = time.monotonic()
        flush = await self.run(
            Flush, self.storage, identity, snapshot.memory, attempt=job.attempt, throttle=self._throttle
        )
        try:
            taken: set[int] = set()
            await asyncio.gather(*(self._pump(flush, snapshot, job, taken) for _ in range(self._num_threads)))
            while snapshot.state is State.FILLING and not job.stopped:
                await snapshot.changed.wait()
            if job.stopped:
                return None
            record = await self.run(flush.finish)
        finally:
            await self.run(flush.__exit__, None, None, None)
        self.counters.last_flush_s = time.monotonic() - start
        return record

    async def _pump(self, flush: Flush, snapshot: Snapshot, job: Job, taken: set[int]) -> None:
        """Write extent after extent, until there are no more; several of these share the work."""
        try:
            while len(taken) < snapshot.memory.layout.num_extents and not job.stopped:
                ready = snapshot.copied - taken
                if not ready:
                    await snapshot.changed.wait()
                    continue
                extent = min(ready)
                taken.add(extent)
                await self.run(flush.write, extent)
                self.counters.bytes_written += EXTENT_BYTES
                snapshot.written.add(extent)
                if snapshot.memory.streams:
                    snapshot.notify()
        except BaseException:
            job.stopped = True
            snapshot.notify()
            raise

    async def promote(self, source: "Lane", folder: str, job: Job) -> WriterRecord | None:
        """Copy one writer's part of a checkpoint from another tier; None if stopped. StorageError, DamageError."""
        record = await self.run(
            promote,
            source.storage,
            folder,
            self.storage,
            writer=job.writer,
            attempt=job.attempt,
            throttle=self._throttle,
            go_on=lambda: not job.stopped,
        )
        if record:
            self.counters.bytes_written += record.layout.num_extents * EXTENT_BYTES
        return record

    async def discard(self, step: int, job: Job) -> None:
        """Delete what a job has left that came to nothing; whatever cannot be deleted is collected later."""
        folder = working_folder(self.storage, step, job.attempt)
        await self.run(self.storage.remove, f"{folder}/data/{job.writer}")


def _run(pool: ThreadPoolExecutor, call: Callable[[], T]) -> Awaitable[T]:
    return asyncio.get_running_loop().run_in_executor(pool, call)
