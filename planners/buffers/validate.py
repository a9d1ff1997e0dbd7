"""Is this plan what it says? Checked by a sweep over time that shares nothing with the planners.

At each moment the living buffers are kept in the order of their offsets. A buffer that is born must end before the next
one begins and begin after the one before it ends; if that holds at every birth, no two rectangles ever meet.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from .problem import Buffer

_SHOWN = 20


def violations(
    buffers: Sequence[Buffer], offsets: Sequence[int], *, peak: int, capacity: int | None = None
) -> list[str]:
    """What is wrong with ``offsets``, in words; empty if nothing is. ``peak`` is the one that was claimed."""
    if len(offsets) != len(buffers):
        return [f"{len(buffers)} buffers have {len(offsets)} offsets"]
    found = [
        f"{buffer.id} lies at the negative offset {offset}"
        for buffer, offset in zip(buffers, offsets, strict=True)
        if offset < 0
    ]
    top = max((offset + each.size for each, offset in zip(buffers, offsets, strict=True)), default=0)
    if top != peak:
        found.append(f"the highest byte is {top}, not {peak}")
    if capacity is not None and top > capacity:
        found.append(f"the highest byte {top} is beyond the capacity {capacity}")
    return (found + _collisions(buffers, offsets))[:_SHOWN]


def _collisions(buffers: Sequence[Buffer], offsets: Sequence[int]) -> list[str]:
    """Pairs of buffers that share a byte at a moment, at least one for each buffer that is in another's way."""
    events = [
        (time, kind, index)
        for index, buffer in enumerate(buffers)
        if buffer.size
        for time, kind in ((buffer.lower, 1), (buffer.upper, 0))
    ]
    living: list[tuple[int, int]] = []  # offset, index
    found = []
    for time, kind, index in sorted(events):
        mine = (offsets[index], index)
        if kind == 0:
            del living[bisect_left(living, mine)]
            continue
        place = bisect_left(living, mine)
        for _, other in living[max(0, place - 1) : place + 1]:
            low, high = sorted((index, other), key=lambda each: (offsets[each], each))
            if offsets[low] + buffers[low].size > offsets[high]:
                found.append(f"{buffers[low].id} and {buffers[high].id} share bytes at time {time}")
        insort(living, mine)
    return found
