"""One forward of one layer: what autograd saved of it, and where that is until its backward.

::

    pack      a saved tensor becomes a window on a unit (a storage); parameters and constants pass through
    settle    the layer has run: each unit stays, is sent out or let go, row by row (``settle.py``)
    fetch     one layer ahead of its backward: what was sent out starts coming back
    restore   its backward begins: wait for that, make the rest again
    unpack    a window opens on the restored storage

The windows hold the frame, so that it ends, and gives its host memory back, with the last node of the graph that needs
it: after backward, or when the graph is dropped.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor, nn

from distrain.core.device import Event

from .engine import Engine
from .program import Draw, Origin, Program
from .recipe import Recipe
from .replay import Done, Replay
from .storage import VersionGuard, Window, aligned, taken_apart
from .tape import Memory, Tape
from .units import Passed, Saved, Unit

MADE_AGAIN = "; saved tensors are made again from it: give each micro-batch one of its own"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remake:
    """How the units of a frame are made again."""

    program: Program
    recipe: Recipe
    start: int
    """first token that is made again"""
    num_tokens: int
    seeds: Sequence[Draw]
    inputs: Mapping[int, Unit]
    """where the inputs lie that it starts from, by their values"""
    guards: Mapping[int, VersionGuard]
    """of what it starts from: autograd need not have saved that, so that changing it in place is no error to torch"""


class Frame:
    """What one forward of ``layer``, the ``index``-th, saved; ``previous`` gives the frame whose backward follows."""

    def __init__(
        self,
        engine: Engine,
        layer: nn.Module,
        inputs: Sequence[Tensor],
        *,
        index: int,
        previous: "Callable[[], Frame | None]",
    ) -> None:
        self._fetched: Event | None = None
        self._restored = False
        self._held_bytes = 0
        self.units: dict[int, Unit] = {}
        """by the identity of their memory"""
        self.engine = engine
        # As they are now: by the time of backward another tensor may go by the name.
        self._named: dict[str, Tensor] = dict(layer.named_buffers(remove_duplicate=False))
        self._named |= dict(layer.named_parameters(remove_duplicate=False))
        self.tape = Tape(self._named, inputs)
        self.index = index
        self.is_announced = False
        """whether the layer after it, which is left alone, will say when this one's backward is near"""
        self.previous = previous
        self.sent: Event | None = None
        """reached when everything has been sent out; None if nothing was"""
        self.remake: Remake | None = None
        self._inputs: Sequence[Tensor] = inputs

    def __del__(self) -> None:
        self.release()
        for unit in self.units.values():
            if unit.block is not None:
                self.engine.pool.give_back(unit.block)
        self.engine.ledger.hold(-self._held_bytes)

    @property
    def kept_bytes(self) -> int:
        """On the device from forward to backward."""
        units = self.units.values()
        return sum(u.num_bytes if u.stays else 0 if u.kept is None else u.kept.nbytes for u in units)

    @property
    def host_bytes(self) -> int:
        """Held in the pool."""
        return sum(aligned(unit.block.num_bytes) for unit in self.units.values() if unit.block is not None)

    @property
    def returning_bytes(self) -> int:
        """On the device in backward, over and above."""
        return sum(unit.num_bytes for unit in self.units.values() if not unit.stays)

    @property
    def form(self) -> Hashable:
        """What the layer saved; equal for equal forwards."""
        return tuple(unit.window for unit in self.units.values() if unit.memory.is_new)

    def pack(self, tensor: Tensor) -> Passed | Saved:
        """Take a tensor that autograd saves."""
        self.tape.paused = True
        try:
            inner, wrap = taken_apart(tensor)
            memory = None if inner is None else self.tape.memory_of(inner)
            if inner is None or memory is None or not memory.from_data:
                self.engine.ledger.num_passed += 1
                return Passed(tensor)
            self.engine.ledger.num_saved += 1
            return Saved(
                self.unit_of(memory, inner), tensor, inner=inner, wrap=wrap, storage_of=self.storage_of
            )
        finally:
            self.tape.paused = False

    def unit_of(self, memory: Memory, inner: Tensor) -> Unit:
        """The unit of a storage, made if it is a new one."""
        unit = self.units.get(id(memory))
        if unit is None:
            storage = inner.untyped_storage()
            num_bytes = storage.nbytes()
            unit = self.units[id(memory)] = Unit(memory, num_bytes, Window.of(inner), storage)
            self.engine.ledger.num_units += 1
            self.hold(num_bytes)
        return unit

    def add_input(self, number: int) -> Unit:
        """The unit of an input, which may not be saved by anybody but is what the rest is made from."""
        inner = _inner(self._inputs[number])
        memory = self.tape.memory_of(inner)
        assert memory is not None
        return self.unit_of(memory, inner)

    def given(self, origin: Origin) -> Tensor:
        """What the layer was given from outside, as it is now; inputs only until ``close``."""
        if origin.kind == "input":
            return self._inputs[int(origin.key)]
        return (
            self._named[str(origin.key)] if origin.kind == "param" else self.tape.constants[int(origin.key)]
        )

    def freed(self, program: Program) -> set[int]:
        """Values from outside whose memory was taken away when the layer had run, as that of gathered weights is."""
        return {
            value
            for value, origin in program.origins
            if origin.kind in ("param", "constant") and _is_freed(_inner(self.given(origin)))
        }

    def count_gone(self, unit: Unit) -> None:
        """Count where the bytes of a unit went that left the device."""
        kept = 0 if unit.kept is None else unit.kept.nbytes
        swapped = 0 if unit.block is None else unit.block.num_bytes
        self.hold(kept - unit.num_bytes)
        ledger = self.engine.ledger
        ledger.kept_bytes += kept
        ledger.swapped_bytes += swapped
        ledger.recomputed_bytes += unit.num_bytes - kept - swapped

    def close(self) -> None:
        """The layer has run and its units are settled: forget what only lived for its forward."""
        self._inputs = ()
        outside = self.remake.recipe.outside.values() if self.remake is not None else ()
        self._named = {each.key: self._named[each.key] for each in outside if each.kind == "param"}
        self.tape.constants = [
            each.detach() for each in self.tape.constants
        ]  # their history is not ours to keep

    def hold(self, num_bytes: int) -> None:
        """Count bytes that came to the device for this frame, or (negative) left it."""
        self._held_bytes += num_bytes
        self.engine.ledger.hold(num_bytes)

    def storage_of(self, unit: Unit) -> torch.UntypedStorage:
        """Where the data of a unit is, on the device."""
        if not unit.stays and not self._restored:
            self.engine.enter(ref(self))
            self.restore()
            self.engine.prefetch(self.previous())
        assert unit.storage is not None
        return unit.storage

    def fetch(self) -> bool:
        """Start bringing back what was sent out; whether there was anything to start."""
        if self._fetched is not None or self._restored or self.sent is None:
            return False
        away = [unit for unit in self.units.values() if unit.block is not None]
        self._make_room(away)
        copies = [(unit.sent(), unit.part(unit.sent_from, unit.sent_to)) for unit in away]
        self._fetched = self.engine.traffic.fetch(copies, after=self.sent)
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Have every unit on the device."""
        self.fetch()
        if self._fetched is not None:
            self.engine.traffic.wait_for(self._fetched)
        self._restored = True
        kept = [unit for unit in self.units.values() if unit.kept is not None]
        self._make_room([unit for unit in kept if unit.block is None])
        for unit in kept:
            assert unit.kept is not None
            unit.part(0, unit.sent_from).copy_(unit.kept)
        if self.remake is not None:
            self._make_again(self.remake)

    def release(self) -> None:
        """Take what came back, or was made again, off the device."""
        if self._fetched is not None and not self._restored:
            self.engine.traffic.wait_for(self._fetched)  # nobody else may be given that memory before
        self._fetched, self._restored = None, False
        for unit in self.units.values():
            if not unit.stays and unit.storage is not None:
                unit.storage = None
                self.hold(-unit.num_bytes)

    def _make_room(self, units: Sequence[Unit]) -> None:
        """A rounding buffer with a room for each of ``units``."""
        total = sum(aligned(unit.num_bytes) for unit in units)
        if total == 0:
            return
        buffer = torch.empty(total, dtype=torch.uint8, device=self.engine.device.torch_device)
        shift_bytes = 0
        for unit in units:
            unit.storage, unit.shift_bytes = buffer.untyped_storage(), shift_bytes
            shift_bytes += aligned(unit.num_bytes)
            self.hold(unit.num_bytes)

    def _make_again(self, remake: Remake) -> None:
        by_base = {unit.memory.base: unit for unit in self.units.values()}
        self.engine.ledger.num_replays += 1
        self.replay(remake, lambda value, result: self._put(by_base[value], result, remake))

    def replay(self, remake: Remake, done: Done) -> None:
        """Make everything again; ``done`` is given each saved value, or its tail."""
        by_base = {unit.memory.base: unit for unit in self.units.values()}

        def at_hand(value: int) -> Tensor:
            window = remake.program.windows[value]
            if value in remake.inputs:
                remake.guards[value].check(window, hint=MADE_AGAIN)
                unit = remake.inputs[value]
                assert unit.storage is not None
                return window.on(unit.storage, unit.shift_bytes)
            if value not in remake.guards:
                return by_base[value].whole()
            given = _inner(self.given(remake.recipe.outside[value]))
            remake.guards[value].check(window, now=given, hint=MADE_AGAIN)
            return _not_freed(given)

        Replay(
            remake.recipe,
            windows=remake.program.windows,
            seeds=remake.seeds,
            device=self.engine.device.torch_device,
            at_hand=at_hand,
            done=done,
            num_tokens=remake.num_tokens,
            start=remake.start,
        ).run()

    def _put(self, unit: Unit, result: Tensor, remake: Remake) -> None:
        """Let a unit have its part of what was made again."""
        if unit.stays or (unit.has_room and unit.rows is None):
            return  # it is there
        if unit.has_room:
            assert unit.rows is not None
            if unit.sent_to < remake.num_tokens:
                unit.rows.fill(unit.whole(), result, start=unit.sent_to, stop=remake.num_tokens)
            return
        if Window.of(result) != unit.window:
            form, result = (
                result,
                torch.empty_strided(
                    unit.window.shape, unit.window.stride, dtype=unit.window.dtype, device=result.device
                ),
            )
            result.copy_(form)
        unit.storage, unit.shift_bytes = result.untyped_storage(), 0
        self.hold(unit.num_bytes)


def _inner(tensor: Tensor) -> Tensor:
    inner, _ = taken_apart(tensor)
    assert inner is not None
    return inner


def _is_freed(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _not_freed(tensor: Tensor) -> Tensor:
    if _is_freed(tensor):
        raise RuntimeError(
            f"a weight [{tensor.dtype} {list(tensor.shape)}] from which saved tensors are made again was sharded "
            "before their backward: shard the layer as a whole, or swap it"
        )
    return tensor
