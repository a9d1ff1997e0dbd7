"""What all layers of one manager share: memory, streams, counts, what was found out, and whose backward it is."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist

from distrain.core.device import Device
from distrain.core.errors import DistrainError

from .host_pool import HostPool
from .ledger import ActivationReport, Ledger
from .locality import Prober
from .recipe import Recipe
from .traffic import Traffic

RESTORED = 2
"""rounding buffers: layers that are on the device as a whole at a time"""


MOST_REMEMBERED = 256
"""recipes, and forms of layers: as lengths vary there is no end to them"""


@dataclass(slots=True)
class Known:
    """A recipe, and what came of trying it."""

    recipe: Recipe
    wrong: dict[int, frozenset[int]] = field(default_factory=dict)
    """by layer: saved values that it makes, but not as they were"""


class Restorable(Protocol):
    """A frame, as far as the engine cares."""

    def fetch(self) -> bool:
        """Start bringing back what was sent out; whether there was anything to start."""

    def release(self) -> None:
        """Take what came back off the device."""

    @property
    def index(self) -> int:
        """Number of the layer."""

    @property
    def kept_bytes(self) -> int:
        """On the device from forward to backward."""

    @property
    def host_bytes(self) -> int:
        """Held in the pool."""

    @property
    def returning_bytes(self) -> int:
        """On the device in backward, over and above."""

    @property
    def form(self) -> Hashable:
        """What the layer saved; equal for equal forwards."""


class Engine:
    """The shared state of the layers of one manager; ``groups`` compute layers together."""

    def __init__(self, device: Device, pool: HostPool, *, groups: Sequence[dist.ProcessGroup]) -> None:
        self.device = device
        self.pool = pool
        self.traffic = Traffic(device)
        self.ledger = Ledger()
        self._groups = groups
        self._recipes: dict[Hashable, Known] = {}
        self._frames: WeakSet[Restorable] = WeakSet()
        self._forms: dict[tuple[int, int], Hashable] = {}
        self._last: tuple[int, int] = (-1, 0)
        self._restored: list[Callable[[], Restorable | None]] = []

    def known(self, key: Hashable, write: Callable[[], Recipe]) -> Known:
        """The recipe of equal layers that save equal tensors, written once."""
        known = self._recipes.get(key)
        if known is None:
            known = self._recipes[key] = Known(write())
            _forget_oldest(self._recipes)
        return known

    def may_try(self, recipe: Recipe) -> bool:
        """Whether all ranks that its collectives need would try it too.

        Ranks of the manager's groups compute the same layers and write the same recipes at the same time. Of others
        nothing is known: where lengths differ between them, one has seen a form before that is new to another.
        """
        ours = {group.group_name for group in self._groups}
        return {step.node.group_name for step in recipe.steps} <= {None, *ours}

    def prober(self, *, num_tokens: int, start: int) -> Prober:
        """One that tries operators on tokens ``start`` to the end."""
        return Prober(
            num_tokens=num_tokens, start=start, device=self.device.torch_device, agree=self.all_agree
        )

    def settled(self, frame: Restorable, *, num_tokens: int) -> None:
        """A layer's forward is over; count it."""
        self._frames.add(frame)
        ledger = self.ledger
        ledger.most_kept_bytes = max(ledger.most_kept_bytes, sum(each.kept_bytes for each in self._frames))
        index, returning = self._last
        together = frame.returning_bytes + (returning if frame.index == index + 1 else 0)
        ledger.most_returning_bytes = max(ledger.most_returning_bytes, together)
        self._last = frame.index, frame.returning_bytes
        form = self._forms.setdefault((frame.index, num_tokens), frame.form)
        ledger.num_other_forms += form != frame.form
        _forget_oldest(self._forms)

    def report(self) -> ActivationReport:
        """What happened since the last one; see ``ActivationManager.report``."""
        held = sum(frame.host_bytes for frame in self._frames)
        if held != self.pool.held_bytes:
            raise DistrainError(
                "host memory of activations was not given back",
                got=f"{self.pool.held_bytes} bytes are held, {held} by graphs that still live",
            )
        report = self.ledger.report(self.pool)
        self.ledger = Ledger(
            device_bytes=self.ledger.device_bytes, peak_device_bytes=self.ledger.device_bytes
        )
        self.pool.peak_bytes, self.pool.num_refused = self.pool.held_bytes, 0
        return report

    def enter(self, frame: Callable[[], Restorable | None]) -> None:
        """A frame (given weakly) is about to be restored; more than ``RESTORED`` are not."""
        self._restored = [each for each in self._restored if each() is not None and each() is not frame()]
        self._restored.append(frame)
        while len(self._restored) > RESTORED:
            oldest = self._restored.pop(0)()
            if oldest is not None:
                oldest.release()

    def prefetch(self, frame: Restorable | None) -> None:
        """Start bringing back the frame whose backward comes next."""
        if frame is not None and frame.fetch():
            self.ledger.num_fetched_ahead += 1

    def all_agree(self, found: bool) -> bool:
        """Whether every rank that computes the layer found so."""
        if not self._groups:
            return found
        verdict = torch.tensor(int(found), device=self.device.torch_device)
        for group in self._groups:
            dist.all_reduce(verdict, dist.ReduceOp.MIN, group=group)
        return bool(verdict.item())


def _forget_oldest(remembered: dict[Any, Any]) -> None:
    """On every rank the same, which is why the order is that of writing, known to all."""
    while len(remembered) > MOST_REMEMBERED:
        del remembered[next(iter(remembered))]
