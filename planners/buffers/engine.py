"""The native half of the planner, and what to do without it.

``fit`` asks whether buffers fit under a capacity, ``first_fit`` puts them down in a given order. Both are C++ where a
compiler or an earlier build is at hand, and Python otherwise: the same algorithms, answers as valid, some hundred times
slower. The native calls let go of Python's lock, and the search runs in a thread of its own, so Ctrl-C ends it at once.
"""

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.core import native
from distrain.core.errors import MissingDependencyError

from . import skyline
from .bounds import Sections
from .skyline import Fit

_HERE = Path(__file__).parent
_SOURCES = tuple(_HERE / name for name in ("skyline.cpp", "first_fit.cpp", "failures.hpp"))
NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class Engine:
    """How searches are run: natively, or in Python because of ``lacking``."""

    library: ctypes.CDLL | None
    lacking: str = ""

    @property
    def name(self) -> str:
        """For reports."""
        return "skyline" if self.library else "skyline (Python)"

    def fit(
        self, cut: Sections, *, capacity: int, seed: int, max_seconds: float, max_nodes: int = NO_LIMIT
    ) -> Fit:
        """Whether the buffers of ``cut`` fit under ``capacity``; undecided only at a limit."""
        if self.library is None:
            return skyline.fit(
                cut, capacity=capacity, seed=seed, max_nodes=max_nodes, max_seconds=max_seconds
            )
        num, stop = len(cut.size), ctypes.c_int32(0)
        offsets, counts = np.zeros(num, np.int64), np.zeros(2, np.int64)
        call = ctypes.c_int32
        arguments = (
            call(num), call(cut.num_sections), _pointer(cut.lower), _pointer(cut.upper), _pointer(cut.size),
            ctypes.c_int64(capacity), ctypes.c_uint64(seed), ctypes.c_int64(max_nodes),
            ctypes.c_double(max_seconds), ctypes.byref(stop), _pointer(offsets), _pointer(counts),
        )  # fmt: skip
        with ThreadPoolExecutor(1, thread_name_prefix="skyline") as pool:
            running = pool.submit(self.library.skyline_fit, *arguments)
            try:
                answer = running.result()
            except BaseException:
                stop.value = 1
                raise
        fits = None if answer < 0 else answer == 1
        return Fit(fits, tuple(offsets.tolist()) if fits else (), int(counts[0]), int(counts[1]))

    def first_fit(
        self, cut: Sections, order: NDArray[np.int32], *, best: bool
    ) -> tuple[int, NDArray[np.int64]]:
        """Peak and offsets when buffers go down in ``order``, each into the first gap, or the smallest (``best``)."""
        if self.library is None:
            return skyline.first_fit(cut, order, best=best)
        offsets = np.zeros(len(cut.size), np.int64)
        order = np.ascontiguousarray(order, np.int32)
        peak = self.library.first_fit(
            len(order), _pointer(cut.lower), _pointer(cut.upper), _pointer(cut.size), _pointer(order),
            int(best), _pointer(offsets),
        )  # fmt: skip
        return int(peak), offsets


def engine(*, build: bool = False) -> Engine:
    """The native engine if it was built, or is now with ``build`` (running jobs never compile); otherwise Python's."""
    try:
        return Engine(_library(build))
    except MissingDependencyError as error:
        return Engine(None, error.problems[0].error)


PYTHON = Engine(None, "native code was not asked for")


def build() -> None:
    """Compile the library where the cache lacks it, so that jobs find it; MissingDependencyError if that fails."""
    _library(build=True)


@cache
def _library(build: bool) -> ctypes.CDLL:
    library = native.load("buffers", _SOURCES, build=build)
    library.first_fit.restype = ctypes.c_int64
    return library


def _pointer(array: NDArray[np.int32] | NDArray[np.int64]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def ranked(keys: Sequence[float] | NDArray[np.float64]) -> NDArray[np.int32]:
    """Indices by descending key, equal ones as they stand."""
    return np.argsort(-np.asarray(keys, np.float64), kind="stable").astype(np.int32)
