"""The memory of one rank's snapshots: slots, and before them a header each, by which another keeper knows them again.

::

    | header 0 | header 1 | ... | slot 0 | slot 1 | ...
       4 KiB                      multiples of STRIDE

A header says whose snapshot of which step its slot holds, by which layout. Two copies are written in turn, each with a
number and a checksum: when a keeper is killed in the middle of one, the other still stands. Only a keeper writes
headers; checksums of the data lie behind each extent. A trainer that outlives its keeper hands the memory to the next,
which takes over the slots whose headers and bytes are sound (``adopt``).
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from distrain.core import shared_memory
from distrain.core.errors import ConfigError, Problem, raise_if

from .crc import crc32c
from .layout import STRIDE

HEADER_BYTES = 4096
MAX_SLOTS = 64
MAX_ARENA_BYTES = 1 << 44
_COPY_BYTES = HEADER_BYTES // 2
_MAGIC = b"DTslot\0\1"
_HEAD = struct.Struct("<8sQII")  # magic, number, length and crc of what follows
MEMORY_INFO = Path("/proc/meminfo")
CGROUP, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotHeader:
    """What a slot holds."""

    job: str
    step: int
    writer: int
    world_size: int
    layout_digest: str
    objects_digest: str
    sums: int | None
    """checksum over the checksums behind the extents, once all are there"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaShape:
    """How much memory a rank wants."""

    slot_bytes: int
    num_slots: int

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be."""
        problems = []
        if not 1 <= self.num_slots <= MAX_SLOTS:
            problems.append(
                Problem("the number of slots is wrong", got=str(self.num_slots), allowed=f"1 to {MAX_SLOTS}")
            )
        if self.slot_bytes < STRIDE or self.slot_bytes % STRIDE or self.nbytes > MAX_ARENA_BYTES:
            allowed = f"a multiple of {STRIDE}, together up to {MAX_ARENA_BYTES}"
            problems.append(Problem("the size of a slot is wrong", got=str(self.slot_bytes), allowed=allowed))
        raise_if(problems)

    @property
    def first_slot(self) -> int:
        """Bytes before the first slot."""
        return self.num_slots * HEADER_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return self.first_slot + self.num_slots * self.slot_bytes


class Arena:
    """One rank's memory. Several views of it may be in use; ``close`` lets go of the descriptor."""

    def __init__(self, shape: ArenaShape, fd: int) -> None:
        """Take over ``fd``; raises ConfigError if it is not memory of this shape."""
        if not shared_memory.is_ours(fd, nbytes=shape.nbytes):
            os.close(fd)
            raise ConfigError(
                "this is not the memory of a rank", allowed=f"a sealed memfd of {shape.nbytes} bytes"
            )
        self.shape, self.fd = shape, fd
        self._memory = shared_memory.Mapping(fd, nbytes=shape.nbytes)
        self._numbers = [0] * shape.num_slots

    @classmethod
    def create(cls, shape: ArenaShape) -> "Arena":
        """New memory, without pages yet; raises ConfigError if there is not enough."""
        if (free := available_bytes()) < shape.nbytes:
            raise ConfigError(
                "there is not enough memory for the snapshots of a rank",
                got=f"{free >> 20} MiB available",
                allowed=f"{shape.nbytes >> 20} MiB for {shape.num_slots} slots",
                hint="fewer slots, or a smaller one: the state is then streamed to disk",
            )
        return cls(shape, shared_memory.create(shape.nbytes))

    def allocate(self, index: int, go_on: Callable[[], bool]) -> None:
        """Give a slot its pages, while ``go_on``; raises OSError if there are none."""
        first = self.start(index) if index else 0
        end = self.start(index) + self.shape.slot_bytes
        for start in range(first, end, shared_memory.AT_ONCE):
            if not go_on():
                return
            nbytes = min(shared_memory.AT_ONCE, end - start)
            self._memory.populate(start, nbytes)  # first: large pages come through a mapping only
            os.posix_fallocate(self.fd, start, nbytes)

    def slot(self, index: int) -> memoryview:
        """The memory of a slot."""
        start = self.start(index)
        return self._memory.view[start : start + self.shape.slot_bytes]

    def start(self, index: int) -> int:
        """Where a slot begins."""
        return self.shape.first_slot + index * self.shape.slot_bytes

    def header(self, index: int) -> SlotHeader | None:
        """What the slot holds; None if that is nothing, or its headers are torn."""
        copies = [_decode(self._copy(index, which)) for which in (0, 1)]
        number, header = max(copies, key=lambda copy: copy[0])
        self._numbers[index] = max(number, self._numbers[index])
        return header

    def label(self, index: int, header: SlotHeader | None) -> None:
        """Say what the slot holds."""
        self.header(index)
        self._numbers[index] += 1
        copy = self._copy(index, self._numbers[index] % 2)
        data = _encode(self._numbers[index], header)
        copy[: len(data)] = data

    def close(self) -> None:
        """Let go of the memory; other processes may still have it."""
        self._memory.close()
        os.close(self.fd)

    def _copy(self, index: int, which: int) -> memoryview:
        start = index * HEADER_BYTES + which * _COPY_BYTES
        return self._memory.view[start : start + _COPY_BYTES]


def _encode(number: int, header: SlotHeader | None) -> bytes:
    body = json.dumps(asdict(header) if header else None).encode()
    return _HEAD.pack(_MAGIC, number, len(body), crc32c(body, number & 0xFFFFFFFF)) + body


def _decode(copy: memoryview) -> tuple[int, SlotHeader | None]:
    """Number and content of one copy; number -1 if it is torn or was never written."""
    magic, number, length, crc = _HEAD.unpack(copy[: _HEAD.size])
    body = bytes(copy[_HEAD.size : _HEAD.size + length])
    if magic != _MAGIC or len(body) != length or crc32c(body, number & 0xFFFFFFFF) != crc:
        return -1, None
    try:
        value = json.loads(body)
        return number, SlotHeader(**value) if value else None
    except (ValueError, TypeError):
        return -1, None


def available_bytes() -> int:
    """Memory that a new arena could have, without driving others out: of the machine, and of the control group."""
    free = []
    for line in MEMORY_INFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) << 10)
    for group in _control_groups():
        with suppress(OSError, ValueError):  # ValueError: "max"
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            free.append(max(0, limit - used))
    return min(free, default=MAX_ARENA_BYTES)


def _control_groups() -> Iterator[Path]:
    """The folders of this process's control group and of those around it (version 2)."""
    own = ""
    with suppress(OSError):
        own = next((line[3:] for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::")), "")
    path = PurePosixPath("/", own)
    yield from (CGROUP / str(each).lstrip("/") for each in (path, *path.parents))
