"""Which memory a rank gets: that which it had, that which it brings, or new."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from distrain.checkpoint.arena import Arena
from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.flush import SlotMemory
from distrain.core import shared_memory
from distrain.core.wire import Frame

from .adopt import Claim, adopt
from .reception import Answer, Hello
from .session import Refusal
from .shelf import Shelf
from .slots import RankSlots, Snapshot, State
from .work import Say, one_line


class Places:
    """Gives ranks their slots; allocating and checking memory takes threads."""

    def __init__(self, shelf: Shelf, *, job: str, say: Say) -> None:
        self._shelf, self._job, self._say = shelf, job, say
        self._pool = ThreadPoolExecutor(2, "memory")
        self._allocations: dict[str, list[asyncio.Task[None]]] = {}
        self._names = count()
        self._is_closed = False

    async def place(self, hello: Hello, fd: int) -> RankSlots:
        """The slots of a rank; takes over ``fd``. Raises ConfigError if there is no memory to be had."""
        old = self._shelf.current(*hello.who)
        if hello.returns:
            arena = Arena(hello.shape, fd)
            if old and os.path.sameopenfile(old.arena.fd, fd):
                arena.close()
                return old
        elif old and old.arena.shape == hello.shape:
            return old
        else:
            arena = Arena.create(hello.shape)
        if old:
            old.retired = True
        name = f"{hello.world_size}-{hello.rank}-{next(self._names)}"
        slots = RankSlots(name, arena, rank=hello.rank, world_size=hello.world_size)
        await self._adopt(slots, hello.claims)
        return slots

    def allocate(self, slots: RankSlots) -> "list[asyncio.Task[None]]":
        """Give the memory its pages, in the background; a task a slot, with an OSError if there are none for it."""
        known = self._allocations.get(slots.name)
        if known is None or any(each.done() and each.exception() for each in known):
            known = self._allocations[slots.name] = []
            for index in range(slots.arena.shape.num_slots):
                task = asyncio.ensure_future(self._allocate(slots, index, known[-1] if known else None))
                task.add_done_callback(lambda task: task.exception())  # waited for or not
                known.append(task)
        return known

    async def _allocate(self, slots: RankSlots, index: int, before: "asyncio.Task[None] | None") -> None:
        """One slot after the other: the first is needed first."""
        if before:
            await asyncio.shield(before)
        run = asyncio.get_running_loop().run_in_executor
        await run(self._pool, slots.arena.allocate, index, lambda: not self._is_closed)

    def fetch(self, name: str) -> Answer:
        """Memory, for reading."""
        slots = self._shelf.named(name)
        if slots is None:
            raise Refusal("there is no such memory", got=name[:80])
        return Answer(Frame({"nbytes": slots.arena.shape.nbytes}), fd=shared_memory.read_only(slots.arena.fd))

    def close(self) -> None:
        """Stop allocating, and let the threads end."""
        self._is_closed = True
        self._pool.shutdown(wait=False)

    async def _adopt(self, slots: RankSlots, claims: dict[int, Claim]) -> None:
        """Take over what the memory holds, oldest first."""
        run = asyncio.get_running_loop().run_in_executor
        for index, claim in sorted(claims.items(), key=lambda item: item[1].step):
            if index >= len(slots.snapshots):
                continue
            try:
                memory = await run(self._pool, self._check, slots, index, claim)
            except DamageError as error:
                self._say(
                    "warning", "not_adopted", f"rank {slots.rank}, step {claim.step}: {one_line(error)}"
                )
                continue
            snapshot = Snapshot(claim.step, memory, claim.objects, state=State.SEALED)
            snapshot.copied.update(range(memory.layout.num_extents))
            slots.snapshots[index] = snapshot
            self._say("info", "adopted", f"rank {slots.rank}: step {claim.step} is in memory")

    def _check(self, slots: RankSlots, index: int, claim: Claim) -> SlotMemory:
        return adopt(slots.arena, index, claim, job=self._job, writer=slots.rank, world_size=slots.world_size)
