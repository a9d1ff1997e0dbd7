"""A trainer's door to the keeper of its node: find or start it, map its memory, say what is in there.

The keeper is another process that outlives the trainer. This end is thread safe, every call has a timeout, and the
loss of the keeper is survivable: calls raise KeeperLost, while a thread of this end finds or starts another keeper
and hands it the memory, in which sealed snapshots are found again.

::

    client = KeeperClient.connect(job="run1", rank=0, ...)
    slot = client.open(12, layout, objects, policy="block", timeout_s=60)     # None: skipped
    ...copy into slot.memory...; client.copied(slot, [0, 1])
    client.seal(slot)
    client.wait(12, level="committed", timeout_s=60)
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from . import shared_memory
from .shared_memory import Mapping as MemoryMapping
from .sidecar_connection import Connection, OnNotice, checked, receive_fd
from .sidecar_home import JOB, Home
from .sidecar_types import (
    Config,
    Held,
    Identity,
    Json,
    KeeperLost,
    KeeperRefused,
    Layout,
    PinnedWriter,
    SealedStep,
    Slot,
    StepStatus,
)
from .wire import Header
from .wire_ends import SyncEnd

__all__ = ["KeeperClient", "KeeperLost", "KeeperRefused", "PinnedWriter", "SealedStep", "Slot", "StepStatus"]

MEMORY_TIMEOUT_S = 600.0


class KeeperClient:
    """The door of one rank; see ``connect``."""

    def __init__(self, identity: Identity, *, home: Home, start: bool) -> None:
        self._identity = identity
        self._held: dict[int, Held] = {}
        self._known: set[str] = set()
        """digests of layouts that the keeper has been told"""
        self._free: int | None = None
        """a slot that can be filled at once"""
        self._capacity = 0
        """extents that fit in a slot"""
        self._fd = -1
        self._populated: list[Future[None]] = [Future() for _ in range(identity.num_slots)]
        self._populating: threading.Thread | None = None
        self.on_notice: OnNotice = _log
        """called, on a thread of this client, with what the keeper has to say unasked: failures above all"""
        self._connection = Connection(
            home, start=start, introduce=self._introduce, on_notice=lambda notice: self.on_notice(notice)
        )

    @classmethod
    def connect(
        cls,
        *,
        job: str,
        rank: int,
        local_rank: int,
        world_size: int,
        slot_bytes: int,
        num_slots: int,
        config: Config,
        start: bool = True,
        timeout_s: float = 30.0,
        environ: Mapping[str, str] = os.environ,
    ) -> "KeeperClient":
        """Reach the keeper of this node, starting one if there is none and ``start`` says so, and map its memory.

        ``slot_bytes`` is what ``WriterLayout.slot_bytes`` says, or any multiple of STRIDE. The memory is allocated in
        the background: ``ready`` waits for it, and ``open`` for that of its slot. ``job`` names what is saved, equally
        on all ranks. The launcher's variables in ``environ`` (DISTRAIN_JOB, GROUP_RANK, GROUP_WORLD_SIZE) lead to its
        keeper; without them, each ``job`` has one of its own.

        Raises:
            KeeperLost: there is none, or it does not answer.
            KeeperRefused: the memory cannot be had, or the keeper belongs to a job of another configuration.
        """
        identity = Identity(
            job=job,
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            node_rank=int(environ.get("GROUP_RANK", "0")),
            num_nodes=int(environ.get("GROUP_WORLD_SIZE", "1")),
            slot_bytes=slot_bytes,
            num_slots=num_slots,
            config=config.to_json(),
        )
        home = Home(environ.get(JOB) or job, node_rank=identity.node_rank, environ=environ)
        client = cls(identity, home=home, start=start)
        client._connection.open(name=f"distrain-keeper-client-{rank}", timeout_s=timeout_s)
        client._populating = threading.Thread(
            target=client._populate, name=f"distrain-keeper-memory-{rank}", daemon=True
        )
        client._populating.start()
        return client

    # -- memory

    @property
    def slots(self) -> tuple[memoryview, ...]:
        """The writable memory of each slot."""
        return self._slots

    def ready(self, timeout_s: float = MEMORY_TIMEOUT_S) -> None:
        """Wait until the memory is allocated and mapped, so that copying to it runs at full speed.

        Raises:
            KeeperRefused: there is not enough memory.
            KeeperLost: it is not ready in time.
        """
        end = time.monotonic() + timeout_s
        for index in range(len(self._populated)):
            self._slot_ready(index, timeout_s=end - time.monotonic())

    def _slot_ready(self, index: int, *, timeout_s: float = MEMORY_TIMEOUT_S) -> None:
        try:
            self._populated[index].result(max(0.0, timeout_s))
        except TimeoutError:
            raise KeeperLost("the keeper's memory is not ready in time", got=f"{timeout_s:g} s") from None

    # -- saving

    def open(
        self,
        step: int,
        layout: Layout,
        objects: Mapping[str, Json],
        *,
        policy: str,
        timeout_s: float,
        durable: bool = False,
    ) -> Slot | None:
        """A slot to fill with ``layout`` of ``step``; None if the keeper would rather skip the step.

        One slot is filled at a time. ``policy`` says what happens if none is free: ``block`` waits up to
        ``timeout_s``, ``skip`` gives up, ``drop`` sacrifices the oldest snapshot that is not on disk yet. ``objects``
        is JSON by name (``safe_state``). ``durable`` writes the step to every tier, whatever their intervals.
        """
        self._slot_ready(0)  # whether there is memory at all
        digest = layout.digest
        if digest not in self._known:
            self._connection.ask({"do": "layout"}, _dumped(layout.to_json()))
            self._known.add(digest)
        connection = self._connection.number
        request = {"step": step, "digest": digest, "durable": durable}
        payload = _dumped(dict(objects))
        free, self._free = self._free, None
        if free is not None and layout.num_extents <= self._capacity:
            # Known to be free since the last seal: no need to wait for an answer.
            self._slot_ready(free)
            self._connection.tell({"do": "fill", "slot": free, **request}, payload)
            self._held[free] = Held(step, layout, dict(objects))
            return Slot(free, step, self._slots[free], self._capacity, False, connection)
        request |= {"do": "open", "policy": policy}
        answer = self._ask(request, payload, timeout_s=timeout_s)
        if answer["slot"] is None:
            return None
        index, streams = int(answer["slot"]), bool(answer["streams"])
        self._slot_ready(index)
        self._held.pop(index, None)
        if not streams:
            self._held[index] = Held(step, layout, dict(objects))
        self._capacity = int(answer["num_extents"])
        return Slot(index, step, self._slots[index], self._capacity, streams, connection)

    def place(self, slot: Slot, extent: int, *, timeout_s: float = 600.0) -> int:
        """Where in ``slot.memory`` extent ``extent`` begins; in a slot that streams, waits until that place is free.

        Raises:
            KeeperRefused: the stream is broken: the disk failed, or the step was given up.
        """
        if slot.streams and extent >= slot.num_extents:
            self._ask(self._of(slot, {"do": "place", "extent": extent}), timeout_s=timeout_s)
        return extent % slot.num_extents * (len(slot.memory) // slot.num_extents)

    def copied(self, slot: Slot, extents: Iterable[int]) -> None:
        """These extents are complete and will not change any more: the keeper may write them."""
        self._connection.tell(self._of(slot, {"do": "copied", "extents": list(extents)}))

    def seal(self, slot: Slot) -> None:
        """All extents are complete.

        Raises:
            KeeperRefused: some are not, or the step was given up meanwhile.
        """
        self._free = self._connection.ask(self._of(slot, {"do": "seal"})).header["free"]

    def invalidate(self, slot: Slot, reason: str) -> None:
        """What is in the slot is no good; the step is given up on all ranks."""
        self._connection.ask(self._of(slot, {"do": "invalidate", "reason": reason}))

    def wait(self, step: int, *, level: str, tier: str | None = None, timeout_s: float) -> StepStatus:
        """Wait until ``step`` is ``sealed``, ``protected`` or ``committed`` (on ``tier``, or on any), or never will be.

        Returns early with the reason if it never will; ``reached`` False without a reason means ``timeout_s`` is over.
        """
        answer = self._ask({"do": "wait", "step": step, "level": level, "tier": tier}, timeout_s=timeout_s)
        return StepStatus(
            step=step,
            reached=answer["reached"],
            state=answer["state"],
            committed=tuple(answer["committed"]),
            reason=answer["reason"],
        )

    def status(self) -> Mapping[str, Any]:
        """Counters, slots and tiers of this node's keeper, for people and metrics."""
        return self._connection.ask({"do": "status"}).header["status"]  # type: ignore[no-any-return]

    # -- reading

    def sealed_steps(self) -> tuple[SealedStep, ...]:
        """Snapshots in this node's memory, newest first."""
        rows = self._connection.ask({"do": "sealed"}).header["steps"]
        return tuple(
            SealedStep(row["step"], row["protected"], row["world_size"], tuple(row["writers"]))
            for row in rows
        )

    def pin(self, step: int, *, timeout_s: float = 60.0) -> tuple[PinnedWriter, ...]:
        """The bytes that this node's memory has of ``step``, with their checksums; kept there until ``unpin``.

        Raises:
            KeeperRefused: it has none.
        """
        writers = json.loads(self._connection.ask({"do": "pin", "step": step}, timeout_s=timeout_s).payload)
        maps = {name: self._fetch(name) for name in {row["arena"] for row in writers}}
        return tuple(
            PinnedWriter(
                writer=row["writer"],
                layout=row["layout"],
                objects=row["objects"],
                crcs=tuple(row["crcs"]),
                memory=maps[row["arena"]].view[row["start"] : row["start"] + row["nbytes"]].toreadonly(),
            )
            for row in writers
        )

    def unpin(self, step: int) -> None:
        """The bytes are not read any more."""
        self._connection.ask({"do": "unpin", "step": step})

    # -- the end

    def close(self, *, flush: bool, timeout_s: float = 600.0) -> bool:
        """Leave in good order, with ``flush`` once nothing is left to write; whether that was reached.

        Never raises for a lost keeper: within ``timeout_s`` it waits for another one that takes over what is in memory.
        """
        if self._connection.closed.is_set():
            return True
        flushed = self._drain(time.monotonic() + timeout_s) if flush else True
        with suppress(KeeperLost, KeeperRefused):
            self._connection.ask({"do": "bye"}, timeout_s=5.0)
        self._connection.close()
        if self._populating:
            self._populating.join(MEMORY_TIMEOUT_S)
        self._memory.close()
        os.close(self._fd)
        return flushed

    def _drain(self, deadline: float) -> bool:
        while (left_s := deadline - time.monotonic()) > 0 and not self._connection.refused:
            try:
                self._ask({"do": "drain"}, timeout_s=left_s)
                return True
            except KeeperRefused as error:
                self.on_notice({"event": "not_flushed", "level": "error", "text": str(error)})
                return False
            except KeeperLost:
                time.sleep(0.1)
        self.on_notice({"event": "not_flushed", "level": "error", "text": "no keeper has written everything"})
        return False

    # -- how it works

    def _ask(self, request: Header, payload: bytes = b"", *, timeout_s: float) -> Header:
        """The answer to a request for which the keeper may have to wait."""
        return self._connection.ask({**request, "timeout_s": timeout_s}, payload, timeout_s=timeout_s).header

    def _of(self, slot: Slot, request: Header) -> Header:
        """The request about a slot, unless that was another keeper's."""
        if slot.connection != self._connection.number:
            raise KeeperLost("the keeper was lost while the slot was being filled", got=f"step {slot.step}")
        return {**request, "slot": slot.index}

    def _introduce(self, end: SyncEnd, deadline: float) -> None:
        """Say hello: with the memory that this end already has, or to be given some."""
        held, returns = dict(self._held), self._fd >= 0
        hello = {"do": "hello", "returns": returns, **self._identity.to_json()}
        end.send(hello, _handed_back(held) if returns else b"")
        if returns:
            socket.send_fds(end.socket, [b"\0"], [self._fd])
        answer = checked(end.receive(timeout_s=max(1.0, deadline - time.monotonic()))).header
        if not returns:
            self._map(receive_fd(end.socket), answer)
        self._known.clear()
        self._free = None

    def _map(self, fd: int, answer: Header) -> None:
        slots, slot_bytes = self._identity.num_slots, self._identity.slot_bytes
        start = int(answer["first_slot"])
        nbytes = start + slots * slot_bytes
        if not shared_memory.is_ours(fd, nbytes=nbytes):
            os.close(fd)
            raise KeeperRefused("the keeper gave memory of another kind or size", got=f"not {nbytes} bytes")
        self._fd, self._memory = fd, MemoryMapping(fd, nbytes=nbytes)
        places = (start + i * slot_bytes for i in range(slots))
        self._slots = tuple(self._memory.view[place : place + slot_bytes] for place in places)

    def _populate(self) -> None:
        """As soon as the keeper has allocated the memory of a slot: map it ahead of use."""
        try:
            start = 0
            for index, populated in enumerate(self._populated):
                self._await_allocation(index)
                end = len(self._memory.view) - (len(self._populated) - 1 - index) * self._identity.slot_bytes
                while start < end and not self._connection.closed.is_set():
                    nbytes = min(shared_memory.AT_ONCE, end - start)
                    self._memory.populate(start, nbytes)
                    start += nbytes
                populated.set_result(None)
        except BaseException as error:
            for populated in self._populated:
                if not populated.done():
                    populated.set_exception(error)

    def _await_allocation(self, index: int) -> None:
        while True:
            try:
                self._connection.ask({"do": "ready", "slot": index}, timeout_s=MEMORY_TIMEOUT_S)
                return
            except KeeperLost:
                if self._connection.refused or self._connection.closed.wait(0.1):
                    raise

    def _fetch(self, arena: str) -> MemoryMapping:
        """The memory of a rank for reading; this rank's own is mapped and populated already."""
        answer, fd = self._connection.fetch({"do": "fetch", "job": self._identity.job, "arena": arena})
        try:
            if os.path.sameopenfile(fd, self._fd):
                return self._memory
            return MemoryMapping(fd, nbytes=int(answer["nbytes"]), writable=False)
        finally:
            os.close(fd)


def _dumped(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _handed_back(held: Mapping[int, Held]) -> bytes:
    """What is in the slots, for a keeper that finds them in memory it has never seen."""
    layouts = {each.layout.digest: each.layout for each in held.values()}
    slots = {
        str(index): {"step": each.step, "digest": each.layout.digest, "objects": each.objects}
        for index, each in held.items()
    }
    return _dumped({"layouts": [layout.to_json() for layout in layouts.values()], "slots": slots})


def _log(notice: Mapping[str, Any]) -> None:
    level = logging.ERROR if notice.get("level") == "error" else logging.WARNING
    logging.getLogger("distrain.keeper").log(level, "%s", notice.get("text", notice))
