"""The shell around the agreement: sends what it says, commits what it decides, counts its pauses.

It runs in the keeper of node 0. That keeper's own member is connected directly, those of other nodes by TCP.
"""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from distrain.checkpoint.collect import Retention, collect
from distrain.checkpoint.commit import commit, prepared, working_folder
from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.keeper_config import KeeperConfig
from distrain.checkpoint.storage import Storage
from distrain.checkpoint.untrusted import Json

from .agreement import Agreement
from .lanes import Lane
from .terms import Commit, Message, Output, Retry, Rules, Tell
from .work import Say, one_line

Send = Callable[[Message, bytes], None]


class Coordinator:
    """One agreement for each world size that the job has had; the older ones only finish what they have begun."""

    def __init__(self, config: KeeperConfig, *, lanes: Sequence[Lane], say: Say) -> None:
        self._config, self._lanes, self._say = config, lanes, say
        self._agreements: dict[int, Agreement] = {}
        self._members: dict[int, Send] = {}
        self._numbers = count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pauses: set[asyncio.TimerHandle] = set()
        self._records: dict[tuple[int, int, str], dict[int, bytes]] = {}
        """of writers that have prepared on their nodes' disks, by tier, step and attempt"""
        self._published: dict[tuple[int, int, str], dict[int, Message]] = {}
        """what members say of their own commits"""
        self._replies = asyncio.Event()

    def attach(self, send: Send) -> int:
        """A member has come; its number."""
        number = next(self._numbers)
        self._members[number] = send
        return number

    def detach(self, member: int) -> None:
        """A member is gone."""
        if self._members.pop(member, None):
            for world, agreement in self._agreements.items():
                self._carry_out(world, agreement.gone_member(member))
            for published in self._published.values():
                published.pop(member, None)
            self._reply()

    @property
    def num_members(self) -> int:
        """Keepers that are connected, this one included."""
        return len(self._members)

    @property
    def busy(self) -> bool:
        """Whether anything is being agreed on."""
        return bool(self._tasks or any(each.busy for each in self._agreements.values()))

    def take(self, member: int, message: Message, payload: bytes = b"") -> None:
        """A message from a member."""
        world = message["world"]
        if message["do"] == "published":
            key = message["tier"], message["step"], message["attempt"]
            if key in self._published:
                self._published[key][member] = message
                self._reply()
            return
        if payload:
            key = message["tier"], message["step"], message["attempt"]
            self._records.setdefault(key, {})[message["writer"]] = payload
        self._carry_out(world, self._agreement(world).take(member, message))

    def close(self) -> None:
        """Stop counting pauses."""
        for pause in self._pauses:
            pause.cancel()

    def _agreement(self, world: int) -> Agreement:
        if world not in self._agreements:
            config = self._config
            rules = Rules(
                world_size=world,
                every=[tier.every for tier in config.tiers],
                num_attempts=config.num_attempts,
                backoff_s=config.backoff_s,
            )
            self._agreements[world] = Agreement(rules, new_name=lambda: secrets.token_hex(8))
        return self._agreements[world]

    def _carry_out(self, world: int, outputs: Sequence[Output]) -> None:
        for output in outputs:
            match output:
                case Tell(member, message):
                    if message["do"] == "abandon":
                        self._records.pop((message["tier"], message["step"], message["attempt"]), None)
                    self._send(member, {"world": world, **message})
                case Commit():
                    self._spawn(self._commit(world, output))
                case Retry(tier, step, after_s):
                    self._pause(after_s, lambda t=tier, s=step: self._retry(world, t, s))  # type: ignore[misc]

    def _send(self, member: int | None, message: Message, payload: bytes = b"") -> None:
        for number, send in list(self._members.items()):
            if member is None or number == member:
                send(message, payload)

    def _retry(self, world: int, tier: int, step: int) -> None:
        self._carry_out(world, self._agreement(world).retry(tier, step))

    def _pause(self, after_s: float, then: Callable[[], None]) -> None:
        def over() -> None:
            self._pauses.discard(handle)
            then()

        handle = asyncio.get_running_loop().call_later(after_s, over)
        self._pauses.add(handle)

    async def _commit(self, world: int, decided: Commit) -> None:
        agreement, lane = self._agreement(world), self._lanes[decided.tier]
        try:
            if lane.config.shared:
                mesh = self._config.mesh
                folder = await lane.control(commit_as_agreed, lane.storage, decided, mesh=mesh)
            else:
                folder = await self._commit_on_nodes(world, decided)
        except Exception as error:
            self._carry_out(world, agreement.refused(decided, one_line(error)))
            return
        self._carry_out(world, agreement.committed(decided, folder))
        if lane.config.shared:
            await self._collect(lane)

    async def _commit_on_nodes(self, world: int, decided: Commit) -> str:
        """Have every node commit its part, with the records of all."""
        key = decided.tier, decided.step, decided.attempt
        records = self._records.pop(key, {})
        payload = b"[" + b",".join(records[writer] for writer in sorted(records)) + b"]"
        published = self._published[key] = {}
        try:
            message = {
                "do": "publish",
                "tier": decided.tier,
                "step": decided.step,
                "attempt": decided.attempt,
            }
            self._send(None, {"world": world, **message}, payload)
            members = set(self._members)
            while not members & self._members.keys() <= published.keys():
                await self._replies.wait()
        finally:
            del self._published[key]
        if not published:
            raise DamageError("every node is lost")
        for reply in published.values():
            if reply["reason"]:
                raise DamageError(reply["reason"])
        return str(next(iter(published.values()))["folder"])

    def _reply(self) -> None:
        self._replies.set()
        self._replies = asyncio.Event()

    async def _collect(self, lane: Lane) -> None:
        """Apply retention to a storage that all nodes share."""
        keep = Retention(keep_last=lane.config.keep_last, keep_every=lane.config.keep_every)
        agreements = self._agreements.values()
        pinned = set[int]().union(*(each.needed(lane.index) for each in agreements))
        in_flight = [
            working_folder(lane.storage, step, attempt)
            for each in agreements
            for step, attempt in each.in_flight.get(lane.index, ())
        ]
        try:
            await lane.control(collect, lane.storage, keep, pinned=pinned, in_flight=in_flight)
        except Exception as error:
            self._say("warning", "collect_failed", f"old checkpoints stay on {lane.name}: {one_line(error)}")

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._say("error", "internal_error", one_line(error))


def commit_as_agreed(storage: Storage, decided: Commit, *, mesh: Mapping[str, Json]) -> str:
    """Commit what the writers have prepared, if it is what they said."""
    found = prepared(storage, decided.step, decided.attempt)
    for writer, digest in decided.digests.items():
        if writer not in found:
            raise DamageError(f"what writer {writer} has prepared is not to be seen in {storage.name}")
        if found[writer].digest != digest:
            raise DamageError(f"what writer {writer} has prepared in {storage.name} is something else by now")
    return commit(storage, decided.step, decided.attempt, mesh=mesh)
