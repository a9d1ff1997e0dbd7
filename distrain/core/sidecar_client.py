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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from . import shared_memory
from .errors import DistrainError
from .shared_memory import Mapping as MemoryMapping
from .sidecar_home import Home
from .wire import Frame, Header, WireError, initiate
from .wire_ends import SyncEnd

PURPOSE = "keeper client"
ARENA_TIMEOUT_S = 600.0
_MARGIN_S = 5.0  # how much longer than the keeper this end waits for an answer
_LONGEST_BACKOFF_S = 10.0

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
    """extents that fit; a slot that streams takes turns with them: see ``KeeperClient.place``"""
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


@dataclass(slots=True)
class _Held:
    """What is in a slot, for a keeper that has to be told."""

    step: int
    layout: Layout
    objects: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Identity:
    """Who this end is, as it says hello."""

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
        return {name: getattr(self, name) for name in self.__slots__}


class KeeperClient:
    """The connection of one rank; see ``connect``."""

    def __init__(self, identity: _Identity, *, home: Home, start: bool) -> None:
        self._identity, self._home, self._start = identity, home, start
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._waiting: dict[int, Future[Frame]] = {}
        self._held: dict[int, _Held] = {}
        self._known: set[str] = set()
        self._end: SyncEnd | None = None
        self._connection = 0
        self._closed = threading.Event()
        self._dead = ""
        self._populated: Future[None] = Future()
        self._fd = -1
        self.on_notice: Callable[[Mapping[str, Any]], None] = _log_notice
        """called, on a thread of this client, with what the keeper has to say unasked: failures above all"""

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
        the background: ``ready`` waits for it, and so does the first ``open``. The node is told by the launcher's
        GROUP_RANK and GROUP_WORLD_SIZE in ``environ``.

        Raises:
            KeeperLost: there is none, or it does not answer.
            KeeperRefused: the memory cannot be had, or the keeper belongs to a job of another configuration.
        """
        identity = _Identity(
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
        client = cls(identity, home=Home(job, node_rank=identity.node_rank, environ=environ), start=start)
        client._attach(timeout_s=timeout_s)
        threading.Thread(target=client._listen, name=f"distrain-keeper-client-{rank}", daemon=True).start()
        threading.Thread(target=client._populate, name=f"distrain-keeper-memory-{rank}", daemon=True).start()
        return client

    # -- memory

    @property
    def slots(self) -> tuple[memoryview, ...]:
        """The writable memory of each slot."""
        return self._slots

    def ready(self, timeout_s: float = ARENA_TIMEOUT_S) -> None:
        """Wait until the memory is allocated and mapped, so that copying to it runs at full speed.

        Raises:
            KeeperRefused: there is not enough memory.
            KeeperLost: it is not ready in time.
        """
        try:
            self._populated.result(timeout_s)
        except (TimeoutError, CancelledError):
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

        ``policy`` says what happens if no slot is free: ``block`` waits up to ``timeout_s``, ``skip`` gives up,
        ``drop`` sacrifices the oldest snapshot that is not on disk yet. ``objects`` is JSON by name (``safe_state``).
        ``durable`` writes the step to every tier, whatever their intervals.
        """
        self.ready()
        digest = layout.digest
        if digest not in self._known:
            self._ask({"do": "layout"}, json.dumps(layout.to_json(), separators=(",", ":")).encode())
            self._known.add(digest)
        connection = self._connection
        request = {"do": "open", "step": step, "digest": digest, "policy": policy, "durable": durable}
        payload = json.dumps(dict(objects), separators=(",", ":")).encode()
        answer = self._ask(request | {"timeout_s": timeout_s}, payload, timeout_s=timeout_s).header
        if answer["slot"] is None:
            return None
        index = int(answer["slot"])
        if not answer["streams"]:
            self._held[index] = _Held(step, layout, objects)
        return Slot(
            index, step, self._slots[index], int(answer["num_extents"]), answer["streams"], connection
        )

    def place(self, slot: Slot, extent: int, *, timeout_s: float = 600.0) -> int:
        """Where in ``slot.memory`` extent ``extent`` begins; in a slot that streams, waits until that place is free.

        Raises:
            KeeperRefused: the stream is broken: the disk failed, or the step was given up.
        """
        from_start = extent % slot.num_extents
        if slot.streams and extent >= slot.num_extents:
            request = {"do": "place", "slot": slot.index, "extent": extent, "timeout_s": timeout_s}
            self._ask(self._of(slot, request), timeout_s=timeout_s)
        return from_start * (len(slot.memory) // slot.num_extents)

    def copied(self, slot: Slot, extents: Iterable[int]) -> None:
        """These extents are complete and will not change any more: the keeper may write them."""
        self._tell(self._of(slot, {"do": "copied", "slot": slot.index, "extents": list(extents)}))

    def seal(self, slot: Slot) -> None:
        """All extents are complete.

        Raises:
            KeeperRefused: some are not, or the step was given up meanwhile.
        """
        self._ask(self._of(slot, {"do": "seal", "slot": slot.index}))

    def invalidate(self, slot: Slot, reason: str) -> None:
        """What is in the slot is no good; the step is given up on all ranks."""
        self._ask(self._of(slot, {"do": "invalidate", "slot": slot.index, "reason": reason}))

    def wait(self, step: int, *, level: str, tier: str | None = None, timeout_s: float) -> StepStatus:
        """Wait until ``step`` is ``sealed``, ``protected`` or ``committed`` (on ``tier``, or on any), or never will be.

        Returns early with the reason if it never will; ``reached`` False without a reason means ``timeout_s`` is over.
        """
        request = {"do": "wait", "step": step, "level": level, "tier": tier, "timeout_s": timeout_s}
        answer = self._ask(request, timeout_s=timeout_s).header
        return StepStatus(
            step=step,
            reached=answer["reached"],
            state=answer["state"],
            committed=tuple(answer["committed"]),
            reason=answer["reason"],
        )

    def status(self) -> Mapping[str, Any]:
        """Counters, slots and tiers of this node's keeper, for people and metrics."""
        return self._ask({"do": "status"}).header["status"]  # type: ignore[no-any-return]

    # -- reading

    def sealed_steps(self) -> tuple[SealedStep, ...]:
        """Snapshots in this node's memory, newest first."""
        rows = self._ask({"do": "sealed"}).header["steps"]
        return tuple(
            SealedStep(row["step"], row["protected"], row["world_size"], tuple(row["writers"]))
            for row in rows
        )

    def pin(self, step: int, *, timeout_s: float = 60.0) -> tuple[PinnedWriter, ...]:
        """The bytes that this node's memory has of ``step``, checked, and kept there until ``unpin``.

        Raises:
            KeeperRefused: it has none, or they are damaged.
        """
        answer = self._ask({"do": "pin", "step": step}, timeout_s=timeout_s)
        writers = json.loads(answer.payload)
        maps = {row["arena"]: self._fetch(row["arena"]) for row in writers}
        return tuple(
            PinnedWriter(
                writer=row["writer"],
                layout=row["layout"],
                objects=row["objects"],
                crcs=tuple(row["crcs"]),
                memory=maps[row["arena"]].view[row["start"] : row["start"] + row["nbytes"]],
            )
            for row in writers
        )

    def unpin(self, step: int) -> None:
        """The bytes are not read any more."""
        self._ask({"do": "unpin", "step": step})

    # -- the end

    def close(self, *, flush: bool, timeout_s: float = 600.0) -> None:
        """Leave in good order, with ``flush`` once nothing is left to write; never raises for a lost keeper."""
        if self._closed.is_set():
            return
        with suppress(KeeperLost, KeeperRefused):
            if flush:
                self._ask({"do": "drain", "timeout_s": timeout_s}, timeout_s=timeout_s)
            self._ask({"do": "bye"}, timeout_s=5.0)
        self._closed.set()
        if self._end:
            self._end.close()
        for thread in threading.enumerate():
            if thread.name.endswith(f"-{self._identity.rank}") and thread.name.startswith("distrain-keeper-"):
                thread.join(5.0)

    # -- how it works

    def _attach(self, *, timeout_s: float) -> None:
        """Reach a keeper and say hello: with the memory that this end already has, or to be given some."""
        deadline = time.monotonic() + timeout_s
        end = self._reach(deadline)
        try:
            held = dict(self._held)
            returns = self._fd >= 0
            end.send({"do": "hello", "returns": returns, **self._identity.to_json()}, _handed_back(held))
            if returns:
                socket.send_fds(end.socket, [b"\0"], [self._fd])
            answer = _checked(end.receive(timeout_s=max(1.0, deadline - time.monotonic()))).header
            if not returns:
                self._map(_receive_fd(end.socket), answer)
        except WireError as cause:
            end.close()
            raise KeeperLost("the keeper does not answer", got=str(cause)) from cause
        except BaseException:
            end.close()
            raise
        with self._lock:
            self._known.clear()
            self._end = end
            self._connection += 1

    def _reach(self, deadline: float) -> SyncEnd:
        """Connect and shake hands; where nobody listens, start a keeper."""
        pause, said = 0.02, ""
        while True:
            left = max(0.05, deadline - time.monotonic())
            try:
                return self._dial(timeout_s=left)
            except (OSError, WireError) as cause:
                said = str(cause)
            if time.monotonic() > deadline or self._closed.wait(pause):
                raise KeeperLost("no keeper answers on this node", got=said, hint=f"look at {self._home.log}")
            pause = min(2 * pause, 0.5)

    def _dial(self, *, timeout_s: float) -> SyncEnd:
        try:
            connection = self._home.connect(timeout_s=timeout_s)
        except OSError:
            if not self._start:
                raise
            connection = self._begin(timeout_s=timeout_s)
        try:
            return SyncEnd.shake(
                connection, initiate(self._home.key(), purpose=PURPOSE), timeout_s=min(timeout_s, 30.0)
            )
        except BaseException:
            connection.close()
            raise

    def _begin(self, *, timeout_s: float) -> socket.socket:
        """Start a keeper, unless another rank has done so meanwhile, and connect to it."""
        with self._home.locked():
            with suppress(OSError):
                return self._home.connect(timeout_s=timeout_s)
            self._home.key(create=True)
            with self._home.listen() as listener:
                self._home.start(listener).wait()
                return self._home.connect(timeout_s=timeout_s)

    def _map(self, fd: int, answer: Header) -> None:
        slots, slot_bytes = self._identity.num_slots, self._identity.slot_bytes
        start = int(answer["first_slot"])
        nbytes = start + slots * slot_bytes
        if not shared_memory.is_ours(fd, nbytes=nbytes):
            os.close(fd)
            raise KeeperRefused("the keeper gave memory of another kind or size", allowed=f"{nbytes} bytes")
        self._fd, self._memory = fd, MemoryMapping(fd, nbytes=nbytes)
        places = (start + i * slot_bytes for i in range(slots))
        self._slots = tuple(self._memory.view[place : place + slot_bytes] for place in places)

    def _populate(self) -> None:
        """Once the keeper has allocated the memory: map it ahead of use."""
        try:
            while True:
                try:
                    self._ask({"do": "ready"}, timeout_s=ARENA_TIMEOUT_S)
                    break
                except KeeperLost:
                    if self._dead or self._closed.wait(0.1):
                        raise
            for start in range(0, len(self._memory.view), shared_memory.AT_ONCE):
                if self._closed.is_set():
                    break
                left = len(self._memory.view) - start
                self._memory.populate(start, min(shared_memory.AT_ONCE, left))
            self._populated.set_result(None)
        except BaseException as error:
            self._populated.set_exception(error)

    def _listen(self) -> None:
        """Hand answers to who waits for them; find another keeper when this one is lost."""
        while not self._closed.is_set():
            end = self._end
            try:
                while end:
                    frame = end.receive()
                    if "notice" in frame.header:
                        self.on_notice(frame.header["notice"])
                    elif waiting := self._waiting.pop(frame.header.get("re", 0), None):
                        waiting.set_result(frame)
            except WireError as cause:
                self._forget(end, why=str(cause))
            if not self._closed.is_set():
                self._find_another()

    def _forget(self, end: SyncEnd | None, *, why: str) -> None:
        with self._lock:
            self._end = None
            waiting, self._waiting = self._waiting, {}
        if end:
            end.close()
        for future in waiting.values():
            future.set_exception(KeeperLost("the keeper is lost", got=why))

    def _find_another(self) -> None:
        for attempt in count():
            if self._closed.wait(min(0.05 * 2**attempt, _LONGEST_BACKOFF_S) if attempt else 0.0):
                return
            try:
                self._attach(timeout_s=30.0)
                return
            except KeeperLost as error:
                if attempt == 0:
                    self.on_notice({"event": "keeper_lost", "level": "warning", "text": str(error)})
            except DistrainError as error:
                self._dead = str(error)
                self.on_notice({"event": "keeper_refused", "level": "error", "text": str(error)})
                self._closed.wait()

    def _of(self, slot: Slot, request: Header) -> Header:
        """The request, unless the slot was another keeper's."""
        if slot.connection != self._connection:
            raise KeeperLost("the keeper was lost while the slot was being filled", got=f"step {slot.step}")
        return request

    def _tell(self, request: Header) -> None:
        end = self._end
        if end is None:
            raise KeeperLost("there is no keeper at the moment", got=self._dead)
        try:
            end.send(request)
        except WireError as cause:
            raise KeeperLost("the keeper is lost", got=str(cause)) from cause

    def _ask(self, request: Header, payload: bytes = b"", *, timeout_s: float = 30.0) -> Frame:
        number, future = next(self._numbers), Future[Frame]()
        with self._lock:
            end = self._end
            if end is None:
                raise KeeperLost("there is no keeper at the moment", got=self._dead)
            self._waiting[number] = future
        try:
            end.send({**request, "id": number}, payload)
            return _checked(future.result(timeout_s + _MARGIN_S))
        except WireError as cause:
            raise KeeperLost("the keeper is lost", got=str(cause)) from cause
        except TimeoutError:
            raise KeeperLost("the keeper does not answer in time", got=request["do"]) from None
        finally:
            self._waiting.pop(number, None)

    def _fetch(self, arena: str) -> MemoryMapping:
        """The memory of another rank, or of an earlier one, for reading; over a connection of its own."""
        try:
            end = self._dial(timeout_s=30.0)
        except (OSError, WireError) as cause:
            raise KeeperLost("the keeper does not answer", got=str(cause)) from cause
        try:
            end.send({"do": "fetch", "arena": arena})
            answer = _checked(end.receive(timeout_s=30.0)).header
            fd = _receive_fd(end.socket)
        except WireError as cause:
            raise KeeperLost("the keeper does not answer", got=str(cause)) from cause
        finally:
            end.close()
        try:
            return MemoryMapping(fd, nbytes=int(answer["nbytes"]), writable=False)
        finally:
            os.close(fd)


def _handed_back(held: Mapping[int, _Held]) -> bytes:
    """What is in the slots, for a keeper that finds them in memory it has never seen."""
    layouts = {each.layout.digest: each.layout for each in held.values()}
    slots = {
        str(index): {"step": each.step, "digest": each.layout.digest, "objects": dict(each.objects)}
        for index, each in held.items()
    }
    whole = {"layouts": [layout.to_json() for layout in layouts.values()], "slots": slots}
    return json.dumps(whole, separators=(",", ":")).encode()


def _checked(frame: Frame) -> Frame:
    if "refused" in frame.header:
        raise KeeperRefused(str(frame.header["refused"]), got=str(frame.header.get("got", "")))
    return frame


def _receive_fd(connection: socket.socket) -> int:
    connection.settimeout(30.0)
    try:
        _, fds, _, _ = socket.recv_fds(connection, 1, 1)
    except OSError as cause:
        raise WireError("the connection is lost", got=str(cause)) from cause
    finally:
        connection.settimeout(None)
    if len(fds) != 1:
        raise WireError("the keeper gave no memory")
    os.set_inheritable(fds[0], False)
    return fds[0]


def _log_notice(notice: Mapping[str, Any]) -> None:
    level = logging.ERROR if notice.get("level") == "error" else logging.WARNING
    logging.getLogger("distrain.keeper").log(level, "%s", notice.get("text", notice))
