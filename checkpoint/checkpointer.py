"""The face of checkpointing in a training loop: track what matters, say when a step is done, restore.

::

    checkpoints = Checkpointer("runs/a/checkpoints", every=100)
    checkpoints.track(model=model, optimizer=optimizer, scheduler=scheduler, data=loader)
    for step in range(checkpoints.restore(), steps):
        ...
        optimizer.step()                    # waits for what is left of the last copy
        checkpoints.step(step + 1)          # starts a copy when one is due
    checkpoints.close()

Copies go to the keeper's memory beside training; the keeper makes them durable. Whatever goes wrong there is logged and
counted and does not stop training, unless ``strict``.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from distrain.core.device import open_device
from distrain.core.errors import ConfigError, DataError, DistrainError
from distrain.core.sidecar_client import KeeperClient, KeeperLost, KeeperRefused, Slot, StepStatus

from .boxes import collect, optimizers
from .cadence import Auto, Cadence
from .handle import SaveHandle
from .keeper_config import KeeperConfig, TierConfig
from .ranks import Ranks
from .resume import RNG, resume
from .rng import rng_state
from .safe_state import encode
from .snapshot import Snapshot
from .writing import Writing, estimate_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What has happened so far on this rank."""

    snapshots: int = 0
    skipped: int = 0
    invalid: int = 0
    failures: int = 0
    stall_s: float = 0.0
    """time that training has waited, in ``step`` and at the fence"""


class Checkpointer:
    """Snapshots and checkpoints of whatever is tracked; the same calls on every rank."""

    def __init__(
        self,
        path: str | Path,
        *,
        every: int | Auto = 1,
        tiers: Sequence[TierConfig] = (),
        keep_last: int = 3,
        lazy: bool = True,
        policy: str = "block",
        strict: bool = False,
        num_slots: int = 3,
        slot_bytes: int = 0,
        device: str = "auto",
        timeout_s: float = 600.0,
    ) -> None:
        """
        Args:
            path: folder of the checkpoints; the only tier unless ``tiers`` says more.
            every: steps between two snapshots, or ``Auto(...)``, which chooses them by what saving costs here.
            policy: what ``step`` does when no slot of memory is free: block, skip, or drop the oldest unwritten one.
            strict: failures raise instead of being logged and counted, the keeper's in the next call or in ``close``.
            slot_bytes: memory of one snapshot of this rank; 0 estimates it from what is tracked.
        """
        self._path = Path(path).resolve()
        num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        self._cadence = Cadence(every, num_nodes=num_nodes, num_slots=num_slots)
        self._tiers = tuple(tiers) or (TierConfig(url=str(self._path), keep_last=keep_last),)
        self._lazy, self._policy, self._strict = lazy, policy, strict
        self._num_slots, self._slot_bytes, self._timeout_s = num_slots, slot_bytes, timeout_s
        self._device = open_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
        self._tracked: dict[str, Any] = {}
        self._ranks = Ranks()
        self._client: KeeperClient | None = None
        self._writing = Writing(self._ranks)
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="distrain-copy")
        self._running: tuple[Snapshot, Future[None]] | None = None
        self._fences: list[Any] = []
        self._counters = Counters()
        self._error = ""
        """the first failure that was heard of after the call that it belongs to"""
        self._lock = threading.Lock()

    # -- what is saved

    def track(self, **things: Any) -> None:
        """Save and restore these, each under its name: modules, optimizers, anything with a state dict.

        The step of a tracked optimizer waits for the copy that is going on.
        """
        self._tracked |= things
        for optimizer in optimizers(things):
            self._fences.append(optimizer.register_step_pre_hook(lambda *_: self.fence()))

    def step(self, step: int) -> bool:
        """Say that ``step`` steps are done; starts a snapshot if one is due, and returns whether it did."""
        self._raise_if_strict()
        if not self._cadence.is_due(step, now=time.perf_counter()):
            return False
        handle = self.save(step)
        self._cadence.saved(
            step, stalled_s=self._counters.stall_s, flush_s=self._flush_s, agree=self._ranks.gather
        )
        return handle is not None

    def save(self, step: int, *, durable: bool = False) -> SaveHandle | None:
        """Start a snapshot of the state as it is now; None if it was skipped or failed.

        ``durable`` writes it to every tier, due or not.
        """
        self._raise_if_strict()
        start = time.perf_counter()
        try:
            started = self._snapshot(step, durable=durable)
        except (KeeperLost, KeeperRefused) as error:
            self._fail(f"step {step} is not saved: {error}", error)
            return None
        finally:
            self._count(stall_s=time.perf_counter() - start)
        return SaveHandle(step, self.fence, self.wait) if started else None

    def fence(self) -> None:
        """Wait until the copy that is going on, if any, has ended; from here on the state may change."""
        if self._running is not None:
            start = time.perf_counter()
            snapshot, _ = self._running
            snapshot.fence()
            self._count(stall_s=time.perf_counter() - start)

    @property
    def rank(self) -> int:
        """This process among those that checkpoint together."""
        return self._ranks.rank

    @property
    def counters(self) -> Counters:
        """What has happened so far on this rank."""
        return self._counters

    # -- waiting

    def wait(self, step: int, *, level: str = "committed", tier: str | None = None) -> StepStatus:
        """Wait until ``step`` is sealed, protected or committed; see ``KeeperClient.wait``."""
        self._finish_copy()
        return self._connected().wait(step, level=level, tier=tier, timeout_s=self._timeout_s)

    def close(self, *, flush: bool = True) -> None:
        """End the copy that is going on, let the keeper write what is due, and leave."""
        self._finish_copy()
        self._copier.shutdown()
        for hook in self._fences:
            hook.remove()
        if self._client is not None:
            self._client.close(flush=flush, timeout_s=self._timeout_s)
            self._client = None
        self._raise_if_strict()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except DataError as error:
            if kind is None:
                raise
            log.error("%s", error)  # what ends the loop already says more

    # -- restoring

    def load(self, step: int, *, strict: bool = True) -> None:
        """Bring everything tracked to ``step``; see ``restore``.

        Raises:
            DataError: it is not there, or damaged.
        """
        if self._restore(strict=strict, only=step) is None:
            raise DataError(f"step {step} cannot be loaded", got="no whole copy of it in memory or on disk")

    def restore(self, *, strict: bool = True) -> int:
        """Bring everything tracked to the newest step that all ranks can read; that step, or 0 if there is none.

        With ``strict`` every tensor must have its counterpart; otherwise what is on one side only is left as it is.

        Raises:
            ConfigError: what was saved does not fit what is tracked; lists all that does not.
        """
        return self._restore(strict=strict, only=None) or 0

    def _restore(self, *, strict: bool, only: int | None) -> int | None:
        client: KeeperClient | None = None
        try:
            client = self._connected()
        except (KeeperLost, KeeperRefused) as error:
            self._fail(f"memory cannot be restored from: {error}", error)
        return resume(
            self._tracked,
            client=client,
            tiers=self._tiers,
            node_rank=int(os.environ.get("GROUP_RANK", "0")),
            ranks=self._ranks,
            strict=strict,
            only=only,
        )

    # -- how it works

    def _snapshot(self, step: int, *, durable: bool) -> bool:
        self._finish_copy()
        state = collect(self._tracked)
        layout, copies = self._writing.plan(state, self._tracked, lazy=self._lazy)
        objects = {name: encode(value, name=name) for name, value in state.objects.items()}
        objects[RNG] = encode(rng_state(), name=RNG)
        client = self._connected()
        slot = client.open(
            step, layout, objects, policy=self._policy, timeout_s=self._timeout_s, durable=durable
        )
        if slot is None:
            self._count(skipped=1)
            return False
        snapshot = Snapshot(
            copies,
            torch.frombuffer(slot.memory, dtype=torch.uint8),
            layout,
            device=self._device,
            place=lambda extent: client.place(slot, extent, timeout_s=self._timeout_s),
            report=lambda extents: client.copied(slot, extents),
            done=lambda reason: self._done(client, slot, reason),
            streams=slot.streams,
        )
        self._running = snapshot, self._copier.submit(snapshot.run)
        if not self._lazy:
            snapshot.fence()
        return True

    def _flush_s(self) -> float:
        """How long the slowest tier has taken for its last flush."""
        try:
            return max((tier["last_flush_s"] for tier in self._connected().status()["tiers"]), default=0.0)
        except (KeeperLost, KeeperRefused):
            return 0.0

    def _done(self, client: KeeperClient, slot: Slot, reason: str) -> None:
        """On the copying thread: the last byte is copied, or it went wrong."""
        try:
            if reason:
                self._count(invalid=1)
                log.error("the snapshot of step %d is no good: %s", slot.step, reason)
                self._error = self._error or f"the snapshot of step {slot.step} is no good: {reason}"
                client.invalidate(slot, reason)
            else:
                client.seal(slot)
                self._count(snapshots=1)
        except (KeeperLost, KeeperRefused) as error:
            self._count(failures=1)
            log.error("the snapshot of step %d is lost: %s", slot.step, error)
            self._error = self._error or f"the snapshot of step {slot.step} is lost: {error}"

    def _finish_copy(self) -> None:
        if self._running is not None:
            running, self._running = self._running[1], None
            running.result()

    def _connected(self) -> KeeperClient:
        if self._client is None:
            if not self._tracked:
                raise ConfigError("nothing is tracked", hint="call track(...) before restore and step")
            self._client = KeeperClient.connect(
                job=hashlib.blake2b(str(self._path).encode(), digest_size=8).hexdigest(),
                rank=self._ranks.rank,
                local_rank=int(os.environ.get("LOCAL_RANK", self._ranks.rank)),
                world_size=self._ranks.world_size,
                slot_bytes=self._slot_bytes or estimate_bytes(self._tracked),
                num_slots=self._num_slots,
                config=KeeperConfig(tiers=self._tiers),
            )
            self._listen(self._client)
        return self._client

    def _listen(self, client: KeeperClient) -> None:
        """Note what the keeper says has failed, beside logging it."""
        log_it = client.on_notice

        def hear(notice: Mapping[str, Any]) -> None:
            log_it(notice)
            if notice.get("level") == "error":
                self._error = self._error or str(notice.get("text", notice))

        client.on_notice = hear

    def _raise_if_strict(self) -> None:
        if self._strict and self._error:
            raise DataError("a checkpoint has failed", got=self._error)

    def _fail(self, text: str, error: DistrainError) -> None:
        self._count(failures=1)
        log.error("%s", text)
        if self._strict:
            raise error

    def _count(self, **more: float) -> None:
        with self._lock:
            old = self._counters
            self._counters = Counters(**(asdict(old) | {k: getattr(old, k) + v for k, v in more.items()}))
