"""The copy of one rank's state into a slot of the arena, while training goes on (DataStates-LLM, 2406.10707).

Parameters and optimizer state do not change between two optimizer steps. Their copy therefore runs beside the next
forward and backward, and a fence before the next ``optimizer.step`` waits for what is left of it::

    step n ── snapshot(n) ──┬─ forward ── backward ──┬─ fence ── step n+1
                            └─ copy, bucket by bucket ┘

What the fenced optimizer does not own (running statistics, random states, whatever user code writes to) is copied at
once, before ``snapshot`` returns. That nothing changed under the lazy copy is not assumed: the version counters that
autograd keeps are compared after the last byte, and a changed tensor makes the slot invalid, loudly.

One code path for both devices: on CUDA the copies go to pinned memory on a stream of their own, a bucket at a time, so
that at most one bucket competes with training; on a CPU the stream is a stand-in and the copying thread does the work.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distrain.core.device import Device

from .boxes import Item
from .layout import EXTENT_BYTES, STRIDE, WriterLayout, segments


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """One piece of a layout with the tensor that fills it."""

    source: Tensor
    offset: int
    """in the writer's logical bytes"""
    lazy: bool


class Snapshot:
    """One copy on its way. ``report`` is told the extents that are complete, from the copying thread."""

    def __init__(
        self,
        copies: Sequence[Copy],
        slot: Tensor,
        layout: WriterLayout,
        *,
        device: Device,
        place: Callable[[int], int],
        report: Callable[[Iterable[int]], None],
        done: Callable[[str], None],
        streams: bool = False,
    ) -> None:
        """``slot`` is the mapped uint8 memory, in which extent i begins at ``place(i)``.

        ``done`` gets the reason why the copy is no good, or "". Where the state ``streams`` through a slot that is
        smaller, there may be no place for an extent until others are reported.
        """
        self._slot, self._place = slot, place
        self._places: dict[int, int] = {}
        self._device = device
        self._report, self._done = report, done
        self._progress = _Progress(layout)
        self._finished = threading.Event()
        eager = [copy for copy in copies if not copy.lazy]
        self._lazy = [copy for copy in copies if copy.lazy]
        self._versions = [copy.source._version for copy in self._lazy]
        self._ready = device.event()
        self._ready.record(device.current_stream())
        # Training waits for these: writing them begins when it does not any more, unless there is no other way.
        stream = device.current_stream()
        complete: list[int] = []
        for copy in eager:
            complete += self._copy(copy)
            if streams and complete:
                self._wait(stream)
                report(complete)
                complete = []
        if eager:
            self._wait(stream)
        if complete:
            report(complete)

    def run(self) -> None:
        """Copy the rest; called on the copying thread."""
        try:
            stream = self._device.stream()
            stream.wait_event(self._ready)
            with self._device.use(stream):
                for copy in self._lazy:
                    complete = self._copy(copy)
                    self._wait(stream)
                    if complete:
                        self._report(complete)
            changed = [c for c, v in zip(self._lazy, self._versions, strict=True) if c.source._version != v]
            self._done(f"{len(changed)} tensors changed while they were copied" if changed else "")
        except BaseException as error:
            self._done(f"{type(error).__name__}: {error}")
        finally:
            self._finished.set()

    def fence(self, timeout_s: float | None = None) -> bool:
        """Wait until the last byte is copied; False if that took longer than ``timeout_s``."""
        return self._finished.wait(timeout_s)

    def _copy(self, copy: Copy) -> list[int]:
        """Begin to copy; the extents that are complete with it."""
        nbytes = copy.source.nbytes
        if nbytes:
            data = copy.source.contiguous().view(-1).view(torch.uint8)
            for position, start, length in segments(copy.offset, nbytes):
                extent, inside = divmod(position, STRIDE)
                if extent not in self._places:
                    self._places[extent] = self._place(extent)
                source = data if length == nbytes else data[start : start + length]
                self._slot.narrow(0, self._places[extent] + inside, length).copy_(source, non_blocking=True)
        return self._progress.add(copy.offset, nbytes)

    def _wait(self, stream: object) -> None:
        event = self._device.event()
        event.record(stream)
        event.synchronize()


class _Progress:
    """Counts the bytes of each extent that are still missing; padding between pieces counts as there."""

    def __init__(self, layout: WriterLayout) -> None:
        self._missing = [0] * layout.num_extents
        for piece in layout.pieces:
            for extent, length in _by_extent(piece.offset, piece.nbytes):
                self._missing[extent] += length

    def add(self, offset: int, nbytes: int) -> list[int]:
        """Bytes have arrived; the extents that are complete now."""
        complete = []
        for extent, length in _by_extent(offset, nbytes):
            self._missing[extent] -= length
            if self._missing[extent] == 0:
                complete.append(extent)
        return complete


def _by_extent(offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
    for position, _, length in segments(offset, nbytes):
        yield position // STRIDE, length


def buckets(item: Item, offset: int, *, lazy: bool, bucket_bytes: int = EXTENT_BYTES) -> Iterator[Copy]:
    """The item in copies of at most about ``bucket_bytes``, cut along its first dim."""
    tensor = item.tensor
    rows = tensor.shape[0] if tensor.dim() else 1
    per_row = max(1, tensor.nbytes // max(1, rows))
    step = max(1, bucket_bytes // per_row)
    if rows <= step or tensor.dim() == 0:
        yield Copy(tensor, offset, lazy)
        return
    for first in range(0, rows, step):
        yield Copy(tensor[first : first + step], offset + first * per_row, lazy)
