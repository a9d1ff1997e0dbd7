"""Time cut into sections, and how low a peak can be at all.

Between two events nothing changes, and a moment whose buffers are all alive at another moment too adds nothing. So
what counts are the moments just before a death that follows a birth: the maximal sets of buffers that live together.
Renumbering time by them leaves the problem as it was, with fewer columns::

    a  [0, 6) ======      sections:  {a, b}  {a, c}      a [0, 2)  b [0, 1)  c [1, 2)
    b  [1, 3)  ==
    c  [4, 5)     =

At every moment the living buffers lie above each other, so no peak is below the largest sum of sizes (the max-live
bound). Sizes that are all multiples of g give offsets that may as well be multiples of g, hence a peak that is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

import numpy as np
from numpy.typing import NDArray

from .problem import Buffer


@dataclass(frozen=True, slots=True)
class Sections:
    """Buffers by index, in sections instead of times; arrays as native code takes them."""

    num_sections: int
    lower: NDArray[np.int32]
    upper: NDArray[np.int32]
    size: NDArray[np.int64]
    load: NDArray[np.int64]
    """sum of sizes of each section"""

    @property
    def step(self) -> int:
        """What divides all sizes: peaks below each other differ by at least this."""
        return max(1, gcd(*self.size.tolist()))

    @property
    def max_live(self) -> int:
        """The largest sum of sizes alive at once."""
        return int(self.load.max(initial=0))

    @property
    def num_cells(self) -> int:
        """Sections that buffers cover, summed over buffers: the work of looking at everything once."""
        return int((self.upper - self.lower).sum())


def sections(buffers: Sequence[Buffer]) -> Sections:
    """The maximal sections of ``buffers``, all of which live."""
    num = len(buffers)
    times = np.array([(each.lower, each.upper) for each in buffers], np.int64).reshape(num, 2).T.ravel()
    kinds = np.repeat(np.array([1, 0], np.int8), num)  # at one time, deaths come before births
    order = np.lexsort((kinds, times))
    born = kinds[order] == 1
    # A section ends at each death whose predecessor is a birth.
    ends = np.cumsum(~born & np.concatenate(([False], born[:-1])))
    place = np.empty(2 * num, np.int32)
    place[order] = ends
    lower, upper = place[:num], place[num:]
    size = np.array([each.size for each in buffers], np.int64)
    num_sections = int(ends[-1]) if num else 0
    change = np.zeros(num_sections + 1, np.int64)
    np.add.at(change, lower, size)
    np.add.at(change, upper, -size)
    return Sections(num_sections, lower.copy(), upper.copy(), size, np.cumsum(change)[:num_sections])


def max_live(buffers: Sequence[Buffer]) -> tuple[int, int, int]:
    """The largest sum of sizes alive at once, and the first ``[start, end)`` at which it is reached."""
    change: dict[int, int] = {}
    for each in buffers:
        change[each.lower] = change.get(each.lower, 0) + each.size
        change[each.upper] = change.get(each.upper, 0) - each.size
    times = sorted(time for time, size in change.items() if size)
    loads = list(accumulate(change[time] for time in times))
    if not times:
        return 0, 0, 0
    peak = max(range(len(times)), key=lambda index: loads[index])
    return loads[peak], times[peak], times[peak + 1]


def components(cut: Sections) -> list[NDArray[np.int64]]:
    """Indices of buffers that hang together in time; what is apart can be planned apart."""
    order = np.argsort(cut.lower, kind="stable")
    reach = np.maximum.accumulate(cut.upper[order]) if len(order) else cut.upper
    breaks = np.flatnonzero(cut.lower[order][1:] >= reach[:-1]) + 1
    return [part for part in np.split(order, breaks) if len(part)]
