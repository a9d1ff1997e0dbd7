"""What one trainer asks of the keeper, and the answers.

Requests that take effect at once are carried out in the order in which they come; those that have to wait do so in
tasks of their own, and a trainer that goes away takes its waiting with it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from distrain.checkpoint.flush import SlotMemory
from distrain.checkpoint.layout import WriterLayout
from distrain.checkpoint.record import MAX_STEP
from distrain.checkpoint.untrusted import array, integer, number, parse, refuse, table, text
from distrain.core.errors import DistrainError
from distrain.core.wire import Frame, Header, WireError
from distrain.core.wire_ends import AsyncEnd

from .member import Member, Step
from .shelf import describe
from .slots import RankSlots, Snapshot, State

REMEMBERED_LAYOUTS = 4
LONGEST_WAIT_S = 86400.0
STRANDED_S = 20.0
"""how long to wait for a coordinator to come back that would have something written"""


class Refusal(DistrainError):
    """Why a request is not carried out."""


class Session:
    """One connected rank."""

    def __init__(
        self,
        slots: RankSlots,
        *,
        member: Member,
        allocated: "Sequence[asyncio.Future[None]]",
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self.slots, self.said_bye = slots, False
        self._member, self._allocated, self._status = member, allocated, status
        self._end: AsyncEnd | None = None
        self._layouts: dict[str, WriterLayout] = {}
        self._pins: dict[int, list[tuple[RankSlots, Snapshot]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, end: AsyncEnd) -> None:
        """Answer until the trainer is gone."""
        self._end = end
        try:
            with suppress(WireError):
                while True:
                    self._take(await end.receive())
        finally:
            for task in self._tasks:
                task.cancel()
            for step in list(self._pins):
                self._unpin(step)
            end.close()

    def leave(self) -> None:
        """The trainer is gone."""
        self._member.leave(self.slots)

    def notice(self, notice: dict[str, Any]) -> None:
        """Tell the trainer something unasked."""
        if self._end:
            self._end.send({"notice": notice})

    def _take(self, frame: Frame) -> None:
        handle = getattr(self, f"_do_{frame.header.get('do')}", None)
        if handle is None:
            raise WireError("a trainer asks for something unknown", got=str(frame.header.get("do")))
        try:
            answer = handle(frame)
        except DistrainError as error:
            self._refuse(frame, error)
            return
        if asyncio.iscoroutine(answer):
            task = asyncio.ensure_future(self._answer_later(frame, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._answer(frame, answer)

    async def _answer_later(self, frame: Frame, answer: Awaitable[Header | Frame | None]) -> None:
        try:
            self._answer(frame, await answer)
        except DistrainError as error:
            self._refuse(frame, error)

    def _answer(self, frame: Frame, answer: Header | Frame | None) -> None:
        if self._end and "id" in frame.header:
            whole = answer if isinstance(answer, Frame) else Frame(answer or {})
            self._end.send({**whole.header, "re": frame.header["id"]}, whole.payload)

    def _refuse(self, frame: Frame, error: DistrainError) -> None:
        problem = error.problems[0]
        if "id" in frame.header:
            self._answer(frame, {"refused": problem.error, "got": problem.got or problem.allowed})
        else:
            self.notice({"event": "refused", "level": "error", "text": str(error)})

    # -- saving

    async def _do_ready(self, frame: Frame) -> None:
        index = integer(frame.header.get("slot"), "slot", high=len(self._allocated) - 1)
        try:
            await asyncio.shield(self._allocated[index])
        except OSError as error:
            raise Refusal("the memory for snapshots cannot be had", got=str(error)) from None

    def _do_layout(self, frame: Frame) -> None:
        layout = WriterLayout.from_json(parse(frame.payload, "the layout"))
        if layout.writer != self.slots.rank:
            refuse("layout.writer", layout.writer, str(self.slots.rank))
        self._layouts[layout.digest] = layout
        for digest in list(self._layouts)[:-REMEMBERED_LAYOUTS]:
            del self._layouts[digest]

    def _do_fill(self, frame: Frame) -> None:
        """Open a slot of which the last ``seal`` has said that it is free."""
        step, layout, objects = self._opening(frame)
        index = integer(frame.header.get("slot"), "slot", high=len(self.slots.snapshots) - 1)
        memory = SlotMemory(self.slots.arena.slot(index), layout)
        if self.slots.snapshots[index] is not None or memory.streams:
            raise Refusal("the slot cannot be filled without asking", got=str(index))
        self._leave_unfinished(step)
        snapshot = Snapshot(step, memory, objects, is_durable=frame.header.get("durable") is True)
        self.slots.fill(index, snapshot)
        self._member.opened(self.slots, snapshot)

    def _opening(self, frame: Frame) -> tuple[int, WriterLayout, Mapping[str, Any]]:
        """Step, layout and objects of what is to be opened."""
        step = integer(frame.header.get("step"), "step", high=MAX_STEP)
        layout = self._layouts.get(text(frame.header.get("digest"), "digest"))
        if layout is None:
            raise Refusal("the layout has not been told")
        return step, layout, table(parse(frame.payload, "the objects"), "the objects")

    async def _do_open(self, frame: Frame) -> Header:
        ask = frame.header
        step, layout, objects = self._opening(frame)
        policy = text(ask.get("policy"), "policy")
        if policy not in ("block", "skip", "drop"):
            refuse("policy", policy, "block, skip, drop")
        deadline = _deadline(ask)
        index, reason = await self._free_slot(step, policy, deadline)
        if index is None:
            self._member.skip(self.slots, step, reason)
            self.notice(
                {"event": "skipped", "level": "warning", "text": f"step {step} is not saved: {reason}"}
            )
            return {"slot": None, "reason": reason}
        memory = SlotMemory(self.slots.arena.slot(index), layout)
        snapshot = Snapshot(step, memory, objects, is_durable=ask.get("durable") is True)
        self.slots.fill(index, snapshot)
        self._member.opened(self.slots, snapshot)
        if memory.streams and (reason := await self._cannot_stream(snapshot, deadline)):
            self._member.give_up(self.slots, snapshot, reason)
            self.notice(
                {"event": "skipped", "level": "warning", "text": f"step {step} is not saved: {reason}"}
            )
            return {"slot": None, "reason": reason}
        return {"slot": index, "streams": memory.streams, "num_extents": memory.capacity}

    async def _free_slot(self, step: int, policy: str, deadline: float) -> tuple[int | None, str]:
        """A slot to fill, or the reason why there is none."""
        while True:
            self._leave_unfinished(step)
            if (index := self.slots.usable()) is not None:
                return index, ""
            if policy == "skip":
                return None, "no slot is free"
            victim = self.slots.victim() if policy == "drop" else None
            if victim and not victim.discarded:
                self._member.give_up(self.slots, victim, f"dropped for step {step}")
                continue
            if not self._member.is_linked and not any(s and s.num_writing for s in self.slots.snapshots):
                return None, "no slot is free, and there is no coordinator to say that one is superseded"
            if not await _changes(self._member.changed, deadline):
                return None, "no slot became free in time"

    def _leave_unfinished(self, step: int) -> None:
        """A trainer fills one slot at a time: another that it has not sealed is of no use."""
        for snapshot in filter(None, list(self.slots.snapshots)):
            if snapshot.state is State.FILLING:
                self._member.give_up(self.slots, snapshot, f"left unfinished for step {step}")

    async def _cannot_stream(self, snapshot: Snapshot, deadline: float) -> str:
        """Why a state that is larger than its slot cannot be saved; empty if it can."""
        key = self.slots.world_size, snapshot.step
        while not snapshot.discarded:
            known = self._member.steps.get(key)
            if known and known.due is not None:
                return "" if known.outstanding else "it is larger than a slot, and no tier is due"
            if not await _changes(self._member.changed, deadline):
                return "it is larger than a slot, and nobody says where to write it"
        return snapshot.discarded

    async def _do_place(self, frame: Frame) -> None:
        snapshot, deadline = self._snapshot(frame), _deadline(frame.header)
        extent = integer(frame.header.get("extent"), "extent", high=snapshot.memory.layout.num_extents - 1)
        while extent - snapshot.memory.capacity not in snapshot.written:
            if snapshot.discarded:
                raise Refusal("the step cannot be streamed to disk", got=snapshot.discarded)
            if not await _changes(snapshot.changed, deadline):
                raise Refusal("the disk is too slow", got=f"no place for extent {extent} in time")

    def _do_copied(self, frame: Frame) -> None:
        snapshot = self._snapshot(frame)
        last = snapshot.memory.layout.num_extents - 1
        extents = array(frame.header.get("extents"), "extents")
        snapshot.copied.update(integer(each, "extent", high=last) for each in extents)
        snapshot.notify()

    def _do_seal(self, frame: Frame) -> Header:
        snapshot = self._snapshot(frame)
        if reason := snapshot.discarded:
            self._member.give_up(self.slots, snapshot, reason)
            raise Refusal(f"step {snapshot.step} was given up", got=reason)
        if missing := snapshot.memory.layout.num_extents - len(snapshot.copied):
            self._member.give_up(self.slots, snapshot, f"{missing} extents were not copied")
            raise Refusal(f"step {snapshot.step} is not complete", got=f"{missing} extents were not copied")
        self._member.seal(self.slots, snapshot)
        self.slots.sweep()
        # Nobody else fills this rank's slots: one that is free stays so until the next step is opened.
        return {"free": self.slots.snapshots.index(None) if None in self.slots.snapshots else None}

    def _do_invalidate(self, frame: Frame) -> None:
        reason = text(frame.header.get("reason"), "reason")
        self._member.give_up(self.slots, self._snapshot(frame), reason)

    def _snapshot(self, frame: Frame) -> Snapshot:
        """The snapshot that this trainer is filling."""
        index = integer(frame.header.get("slot"), "slot", high=len(self.slots.snapshots) - 1)
        snapshot = self.slots.snapshots[index]
        if snapshot is None or snapshot.state is not State.FILLING:
            raise Refusal("the slot is not being filled", got=str(index))
        return snapshot

    # -- waiting

    async def _do_wait(self, frame: Frame) -> Header:
        ask = frame.header
        step, level = integer(ask.get("step"), "step", high=MAX_STEP), text(ask.get("level"), "level")
        if level not in ("sealed", "protected", "committed"):
            refuse("level", level, "sealed, protected, committed")
        deadline = _deadline(ask)
        tier = ask.get("tier")
        while True:
            status = self._status_of(step, level, tier)
            if status["reached"] or status["reason"] or not await _changes(self._member.changed, deadline):
                return status

    def _status_of(self, step: int, level: str, tier: str | None) -> Header:
        known = self._member.steps.get((self.slots.world_size, step))
        snapshot = self.slots.of_step(step)
        committed = [self._member.tier_name(index) for index in known.committed] if known else []
        state = snapshot.state.value if snapshot and not snapshot.discarded else "GONE"
        if level == "committed":
            reached = tier in committed if tier is not None else bool(committed)
            reason = "" if reached else self._never(known, snapshot, tier)
        else:
            wanted = ("SEALED", "PROTECTED") if level == "sealed" else ("PROTECTED",)
            reached = state in wanted or bool(committed)
            reason = (
                "" if reached or state != "GONE" else (known.lost if known else "") or "it is not in memory"
            )
        return {
            "step": step,
            "state": state,
            "committed": committed,
            "reached": reached,
            "reason": reason,
        }

    def _never(self, known: Step | None, snapshot: Snapshot | None, tier: str | None) -> str:
        """Why a step will never be committed, on ``tier`` or at all; empty if it may be."""
        if known is None:
            return "" if snapshot and not snapshot.discarded else "the keeper does not know this step"
        if known.lost:
            return known.lost
        if known.due is None:  # nobody has said so yet, or whoever did is gone
            return "" if snapshot and not snapshot.discarded else "its memory is free again"
        index = self._member.tier_index(tier) if tier is not None else None
        if known.outstanding if index is None else index in known.outstanding:
            return ""
        if index is None:
            return "; ".join(known.failed.values()) or "it is not due on any tier"
        return known.failed.get(index, "it is not due on this tier")

    async def _do_drain(self, frame: Frame) -> Header:
        deadline = _deadline(frame.header)
        self._member.end(self.slots)
        patience = min(deadline, asyncio.get_running_loop().time() + STRANDED_S)
        while self._member.busy or self._member.is_stranded:
            is_alone = self._member.is_stranded and not self._member.busy
            if not await _changes(self._member.changed, patience if is_alone else deadline):
                why = "there is no coordinator" if is_alone else ""
                raise Refusal("not everything is written in time", got=why)
        return {}

    def _do_bye(self, _: Frame) -> None:
        self.said_bye = True

    def _do_status(self, _: Frame) -> Header:
        return {"status": self._status()}

    # -- reading

    def _do_sealed(self, _: Frame) -> Header:
        return {"steps": self._member.shelf.complete_steps()}

    async def _do_pin(self, frame: Frame) -> Frame:
        step = integer(frame.header.get("step"), "step", high=MAX_STEP)
        found = self._member.shelf.complete(step)
        if not found:
            raise Refusal(f"step {step} is not in this node's memory")
        for _, snapshot in found:
            snapshot.num_readers += 1
        self._pins.setdefault(step, []).extend(found)
        for slots, snapshot in found:
            await self._member.work.settle(slots, snapshot, at_once=True)
        return describe(found)

    def _do_unpin(self, frame: Frame) -> None:
        self._unpin(integer(frame.header.get("step"), "step", high=MAX_STEP))

    def _unpin(self, step: int) -> None:
        for _, snapshot in self._pins.pop(step, []):
            snapshot.num_readers -= 1
        self._member.notify()


def _deadline(ask: Header) -> float:
    timeout_s = min(number(ask.get("timeout_s"), "timeout_s"), LONGEST_WAIT_S)
    return asyncio.get_running_loop().time() + timeout_s


async def _changes(event: asyncio.Event, deadline: float) -> bool:
    """Wait for ``event``; False if that takes until ``deadline``."""
    try:
        async with asyncio.timeout_at(deadline):
            await event.wait()
        return True
    except TimeoutError:
        return False
