"""What torch's CUDA caching allocator would reserve for a trace: a simulator, to show what fragmentation costs.

A cache cannot move blocks and does not know what comes next. It keeps what is freed, cuts pieces off, and when no free
piece is large enough it reserves more, though enough may be free in all::

    segment  | a |   free   | b |   free   |     c fits in neither hole: another segment is reserved,
                                             c =============      and stays so
    plan     | a | b |        c        |         known ahead, everything has its place

The rules are those of torch's default settings (c10/cuda/CUDACachingAllocator): sizes are rounded up to 512 bytes; up
to 1 MiB a request is small and cut from segments of 2 MiB; others from segments of 20 MiB, or of their own size in
steps of 2 MiB if they have 10 MiB or more. The smallest free block that is large enough serves, its rest stays free if
it is worth it, and freed blocks join their free neighbours. If the device is full, segments in which nobody lives are
given back.

One stream, no expandable segments, no workspaces of libraries: the rules are torch's, the figures no measurement.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from distrain.planners.buffers import Buffer
from distrain.planners.buffers.problem import check

KIB, MIB = 2**10, 2**20
ROUNDING = 512
MOST_SMALL = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
LEAST_OWN_SEGMENT = 10 * MIB
OWN_ROUNDING = 2 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRun:
    """What the allocator needed for a trace."""

    reserved_bytes: int
    """most bytes that it held at once"""
    allocated_bytes: int
    """most bytes that it had handed out at once, as rounded"""
    live_bytes: int
    """most bytes that were asked for at once: no allocator needs less"""
    num_segments: int
    """segments taken from the device, in all"""
    num_retries: int
    """times that the device was full and everything unused was given back: each stalls the device"""
    refused: str | None
    """id of the buffer for which there was no room; the run ended there"""

    @property
    def fragmentation(self) -> float:
        """Share of what was reserved that never served anybody at the peak."""
        return 1 - self.live_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


def simulate(buffers: Sequence[Buffer], *, num_steps: int = 3, capacity: int | None = None) -> CacheRun:
    """Run a step's ``buffers`` through the cache ``num_steps`` times, on a device of ``capacity`` bytes.

    What a step leaves in the cache serves the next one. Raises ConfigError that lists what is wrong with the buffers.
    """
    check(buffers)
    cache = _Cache(capacity)
    events = list(_events(buffers))
    live_bytes = most_live = 0
    refused = None
    for _ in range(num_steps):
        blocks: dict[int, _Block] = {}
        for is_birth, index in events:
            if not is_birth:
                cache.free(blocks.pop(index))
                live_bytes -= buffers[index].size
                continue
            block = cache.allocate(buffers[index].size)
            if block is None:
                refused = buffers[index].id
                break
            blocks[index] = block
            live_bytes += buffers[index].size
            most_live = max(most_live, live_bytes)
        if refused is not None:
            break
    return CacheRun(
        reserved_bytes=cache.most_reserved,
        allocated_bytes=cache.most_allocated,
        live_bytes=most_live,
        num_segments=cache.num_segments,
        num_retries=cache.num_retries,
        refused=refused,
    )


def _events(buffers: Sequence[Buffer]) -> Iterator[tuple[bool, int]]:
    """Births and deaths in order; at one time deaths come first."""
    moments = [
        (time, is_birth, index)
        for index, buffer in enumerate(buffers)
        if buffer.size
        for time, is_birth in ((buffer.lower, True), (buffer.upper, False))
    ]
    for _, is_birth, index in sorted(moments):
        yield is_birth, index


@dataclass(slots=True, eq=False)
class _Block:
    """A piece of a segment, between its neighbours there."""

    address: int
    size: int
    is_free: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None

    @property
    def is_segment(self) -> bool:
        return self.before is None and self.after is None


@dataclass(slots=True)
class _Pool:
    """Free blocks by size, then address."""

    least_rest: int
    """a rest smaller than this stays with its block"""
    free: dict[tuple[int, int], _Block] = field(default_factory=dict)
    keys: list[tuple[int, int]] = field(default_factory=list)

    def add(self, block: _Block) -> None:
        key = (block.size, block.address)
        insort(self.keys, key)
        self.free[key] = block

    def remove(self, block: _Block) -> None:
        key = (block.size, block.address)
        del self.keys[bisect_left(self.keys, key)], self.free[key]

    def best(self, size: int) -> _Block | None:
        """The smallest free block of at least ``size``, the lowest of several."""
        place = bisect_left(self.keys, (size, 0))
        return self.free[self.keys[place]] if place < len(self.keys) else None


class _Cache:
    """The allocator's state."""

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._small, self._large = _Pool(ROUNDING), _Pool(MOST_SMALL + 1)
        self._reserved = self._allocated = 0
        self._addresses = count(1)  # of segments; the device hands out each once
        self.most_reserved = self.most_allocated = self.num_segments = self.num_retries = 0

    def allocate(self, size: int) -> _Block | None:
        """A block for ``size`` bytes, or None if the device is full."""
        size = -(-size // ROUNDING) * ROUNDING
        pool = self._pool(size)
        block = pool.best(size)
        if block is not None:
            pool.remove(block)
        elif (block := self._segment(size)) is None:
            return None
        if block.size - size >= pool.least_rest:
            pool.add(_split(block, size))
        block.is_free = False
        self._allocated += block.size
        self.most_allocated = max(self.most_allocated, self._allocated)
        return block

    def free(self, block: _Block) -> None:
        """Take back ``block`` and join it with free neighbours."""
        pool = self._pool(block.size)
        self._allocated -= block.size
        block.is_free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.is_free:
                pool.remove(neighbour)
        if block.after is not None and block.after.is_free:
            _join(block, block.after)
        if block.before is not None and block.before.is_free:
            block = block.before
            assert block.after is not None
            _join(block, block.after)
        pool.add(block)

    def _pool(self, size: int) -> _Pool:
        return self._small if size <= MOST_SMALL else self._large

    def _segment(self, size: int) -> _Block | None:
        """A new segment for a request; gives back unused ones if there is no room."""
        if size <= MOST_SMALL:
            size = SMALL_SEGMENT
        elif size < LEAST_OWN_SEGMENT:
            size = LARGE_SEGMENT
        else:
            size = -(-size // OWN_ROUNDING) * OWN_ROUNDING
        if self._capacity is not None and self._reserved + size > self._capacity:
            self._give_back()
            if self._reserved + size > self._capacity:
                return None
        self._reserved += size
        self.most_reserved = max(self.most_reserved, self._reserved)
        self.num_segments += 1
        return _Block(next(self._addresses) << 50, size)

    def _give_back(self) -> None:
        """Every segment that nobody lives in goes back to the device."""
        self.num_retries += 1
        for pool in (self._small, self._large):
            for block in [block for block in pool.free.values() if block.is_segment]:
                pool.remove(block)
                self._reserved -= block.size


def _split(block: _Block, size: int) -> _Block:
    """Cut ``block`` down to ``size``; returns the rest."""
    rest = _Block(block.address + size, block.size - size, before=block, after=block.after)
    if rest.after is not None:
        rest.after.before = rest
    block.size, block.after = size, rest
    return rest


def _join(block: _Block, following: _Block) -> None:
    """Make one block of two neighbours."""
    block.size += following.size
    block.after = following.after
    if block.after is not None:
        block.after.before = block
