"""What autograd saves of a layer: units (storages) and the saved tensors that are windows on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .host_pool import Block
from .rows import Rows
from .storage import VersionGuard, Window, Wrap
from .tape import Memory


@dataclass(slots=True, eq=False)
class Unit:
    """One storage with a saved tensor in it, or from which something is made again.

    Its tokens (bytes, if it has none) up to ``sent_from`` are kept, those up to ``sent_to`` sent out, the rest made
    again; a unit that ``stays`` was left alone.
    """

    memory: Memory
    num_bytes: int
    window: Window
    """of the value that lies in the storage"""
    storage: torch.UntypedStorage | None
    """where the data is on the device; None while it is not there"""
    shift_bytes: int = 0
    """place in the storage, which may be one for many units"""
    stays: bool = True
    rows: Rows | None = None
    sent_from: int = 0
    sent_to: int = 0
    kept: Tensor | None = None
    block: Block | None = None

    @property
    def has_room(self) -> bool:
        """Whether it comes back to a room that was made for it, rather than being made as a whole."""
        return not self.stays and (self.block is not None or self.kept is not None)

    def whole(self) -> Tensor:
        """The value, on the device."""
        assert self.storage is not None
        return self.window.on(self.storage, self.shift_bytes)

    def part(self, first: int, end: int) -> Tensor:
        """Tokens (bytes) ``first`` to ``end``, on the device."""
        if self.rows is not None:
            return self.rows.view(self.whole(), first, end)
        assert self.storage is not None
        return Window((end - first,), (1,), first, torch.uint8).on(self.storage, self.shift_bytes)

    def sent(self) -> Tensor:
        """What was sent out, in the block."""
        assert self.block is not None
        if self.rows is None:
            return self.block.memory
        form = torch.empty_strided(self.window.shape, self.window.stride, device="meta")
        split = self.rows.view(form, self.sent_from, self.sent_to)
        order = Window.of(split).order
        flat = self.block.memory.view(self.window.dtype).view([split.shape[dim] for dim in order])
        return flat.permute([order.index(dim) for dim in range(split.dim())])


class Passed:
    """A saved tensor that stays as it is."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._version = tensor._version
        # A result with its history would keep the node alive that it is saved in.
        self._tensor = tensor if tensor.is_leaf else tensor.detach()

    def tensor(self) -> Tensor:
        """The tensor, if it was not changed in place; otherwise RuntimeError, as torch raises."""
        if (
            self._tensor._version != self._version
        ):  # only then has it to be described: nested tensors have no shape
            VersionGuard.compare(self._tensor, self._version, Window.of(self._tensor))
        return self._tensor


class Saved:
    """A saved tensor that is a window on a unit; ``storage_of`` brings the unit to the device."""

    __slots__ = ("_guard", "_storage_of", "_unit", "_window", "_wrap")

    def __init__(
        self,
        unit: Unit,
        tensor: Tensor,
        *,
        inner: Tensor,
        wrap: Wrap | None,
        storage_of: Callable[[Unit], torch.UntypedStorage],
    ) -> None:
        self._unit, self._wrap, self._storage_of = unit, wrap, storage_of
        self._window = Window.of(inner)
        self._guard = VersionGuard(tensor)

    @torch.no_grad()
    def tensor(self) -> Tensor:
        """The tensor as it was, if its memory was not changed in place; otherwise RuntimeError, as torch raises."""
        self._guard.check(self._window)
        storage = self._storage_of(self._unit)
        inner = self._window.on(storage, self._unit.shift_bytes)
        return inner if self._wrap is None else self._wrap.around(inner).detach()
