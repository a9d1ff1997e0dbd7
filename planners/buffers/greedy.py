"""Quick plans: buffers go down one after the other, each into a gap among those that are already there.

The order decides. The portfolio tries the usual ones, largest first above all. Where they leave a gap to the bound, the
wheel that squeaks gets the grease (Joslin and Clements, 1999): buffers that ended above the bound move to the front of
the order, by a random amount, and all is put down again. Training traces, in which most tensors die in the reverse of
the order in which they were born, mostly end at the bound at once.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bounds import Sections
from .engine import Engine, ranked


@dataclass(frozen=True, slots=True)
class Packing:
    """A valid plan, and the order that made it."""

    peak: int
    offsets: NDArray[np.int64]
    order: NDArray[np.int32]
    name: str


def portfolio(cut: Sections, engine: Engine, *, target: int, deadline: float) -> Packing:
    """The best of all orders; stops at the first whose peak is ``target``, and after ``deadline`` (monotonic)."""
    best: Packing | None = None
    for name, order, smallest_gap in _orders(cut):
        peak, offsets = engine.first_fit(cut, order, best=smallest_gap)
        if best is None or peak < best.peak:
            best = Packing(peak, offsets, order, name)
        if best.peak <= target or time.monotonic() > deadline:
            break
    assert best is not None
    return best


def squeak(
    cut: Sections, start: Packing, engine: Engine, *, target: int, seed: int, deadline: float, rounds: int
) -> Packing:
    """``start``, improved by moving forward what ended above ``target``, for so many ``rounds`` without a gain."""
    random = np.random.default_rng(seed)
    best, place = start, np.empty(len(start.order))
    place[start.order] = np.arange(len(start.order))
    offsets, idle = start.offsets, 0
    while best.peak > target and idle < rounds and time.monotonic() < deadline:
        above = offsets + cut.size > target
        place = np.where(above, place * random.random(len(place)), place)
        order = ranked(-place)
        place[order] = np.arange(len(order))
        peak, offsets = engine.first_fit(cut, order, best=bool(random.random() < 0.3))
        idle += 1
        if peak < best.peak:
            best, idle = Packing(peak, offsets, order, "squeaky wheel"), 0
        elif idle % 20 == 0:  # lost: go back to where it was best
            place[best.order] = np.arange(len(order))
            offsets = best.offsets
    return best


def _orders(cut: Sections) -> Iterator[tuple[str, NDArray[np.int32], bool]]:
    length = (cut.upper - cut.lower).astype(np.float64)
    size = cut.size.astype(np.float64)
    busiest = cut.load == cut.max_live
    crossing = np.concatenate(([0], np.cumsum(busiest)))
    at_peak = (crossing[cut.upper] > crossing[cut.lower]).astype(np.float64)
    keys = {
        "size": size,
        "area": size * length,
        "duration": length,
        "peak first, size": at_peak * size.max(initial=1) * 2 + size,
        "birth": -cut.lower.astype(np.float64),
    }
    for smallest_gap in (False, True):
        for name, key in keys.items():
            yield f"{name}, {'best' if smallest_gap else 'first'} fit", ranked(key), smallest_gap
