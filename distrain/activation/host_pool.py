"""Host memory that swapped tensors wait in: pinned, allocated ahead, bounded, and near the device.

Pinning memory stops the device, so nothing may be pinned while a step runs. Arenas are made before (``reserve``), or as
the first step finds them missing, and are kept; a step then only moves a mark within them. Blocks are taken first fit
and join their free neighbours when they come back.

Near: pages of an arena are touched, and pinned, by a thread that runs on the processors of the device's NUMA node, so
that the kernel puts them there while that node has room. It is a preference: binding them for good would take
mbind(2), which Python has no door to, and a full node spills over to its neighbour without a word.
"""

import os
from bisect import insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrain.core.device import Device

from .storage import aligned

ARENA_BYTES = 64 * 2**20
"""least size of an arena that is made because the others are full"""


@dataclass(slots=True)
class _Arena:
    memory: Tensor
    free: list[tuple[int, int]] = field(default_factory=list)
    """offset and size, by offset"""


@dataclass(frozen=True, slots=True)
class Block:
    """Memory that somebody holds."""

    arena: int
    offset: int
    num_bytes: int
    memory: Tensor
    """uint8"""


class HostPool:
    """At most ``limit_bytes`` of host memory (None: no limit) for one device."""

    def __init__(self, device: Device, *, limit_bytes: int | None = None) -> None:
        self._device = device
        self._limit = limit_bytes
        self._arenas: list[_Arena] = []
        self.held_bytes = 0
        """of blocks that somebody holds"""
        self.peak_bytes = 0
        """most of that"""
        self.num_refused = 0
        """requests that did not fit"""

    @property
    def reserved_bytes(self) -> int:
        """Of all arenas."""
        return sum(arena.memory.numel() for arena in self._arenas)

    def reserve(self, num_bytes: int) -> None:
        """Have at least ``num_bytes``, if the limit allows."""
        missing = num_bytes - self.reserved_bytes
        if missing > 0:
            self._grow(missing)

    def take(self, num_bytes: int) -> Block | None:
        """A block of ``num_bytes``, or None if there is no room."""
        size = aligned(max(num_bytes, 1))
        block = self._fit(size, num_bytes)
        if block is None and self._grow(max(size, ARENA_BYTES), least=size):
            block = self._fit(size, num_bytes)
        if block is None:
            self.num_refused += 1
            return None
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return block

    def give_back(self, block: Block) -> None:
        """Return a block."""
        size = aligned(max(block.num_bytes, 1))
        free = self._arenas[block.arena].free
        insort(free, (block.offset, size))
        joined: list[tuple[int, int]] = []
        for offset, length in free:
            if joined and joined[-1][0] + joined[-1][1] == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((offset, length))
        free[:] = joined
        self.held_bytes -= size

    def _fit(self, size: int, num_bytes: int) -> Block | None:
        for number, arena in enumerate(self._arenas):
            for i, (offset, length) in enumerate(arena.free):
                if length >= size:
                    arena.free[i : i + 1] = [(offset + size, length - size)] if length > size else []
                    return Block(number, offset, num_bytes, arena.memory.narrow(0, offset, num_bytes))
        return None

    def _grow(self, wanted: int, *, least: int = 1) -> bool:
        room = wanted if self._limit is None else min(wanted, self._limit - self.reserved_bytes)
        if room < least:
            return False
        with near(self._device):
            memory = self._device.pinned(room, dtype=torch.uint8)
            memory.zero_()  # the first touch decides where a page lies
        self._arenas.append(_Arena(memory, [(0, room)]))
        return True


@contextmanager
def near(device: Device, *, processors_of: Callable[[Device], set[int]] | None = None) -> Iterator[None]:
    """Run this thread on the processors of the device's NUMA node, where the machine says which these are."""
    processors = (processors_of or _processors)(device)
    before = os.sched_getaffinity(0)
    if not processors & before:
        yield
        return
    os.sched_setaffinity(0, processors & before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _processors(device: Device) -> set[int]:
    node = numa_node(device)
    return set() if node is None else node_processors(node)


def numa_node(device: Device) -> int | None:
    """The NUMA node that a GPU's slot belongs to; None for a processor, and where nobody knows."""
    if device.torch_device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device.torch_device)
    slot = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    try:
        node = int(Path(f"/sys/bus/pci/devices/{slot}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def node_processors(node: int) -> set[int]:
    """The processors of a NUMA node; empty if there is no such node."""
    try:
        text = Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().strip()
    except OSError:
        return set()
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
