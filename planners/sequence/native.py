"""Calls ``waves.cpp``, the search that plans waves in milliseconds.

The search counts its work and stops after some 36 thousand placements for each millisecond it is given, which it
does in about three quarters of the time on a processor of the last years: so a plan depends on lengths, cost model,
limit and seed, and not on the machine or on what else runs there. Where that is too much, the clock ends the search,
and the plan says so: after the time given, of which what other processes take does not count, up to a second.
"""

import ctypes
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distrain.core import native

from .problem import StepProblem

_SOURCES = tuple(
    Path(__file__).with_name(name) for name in ("waves.cpp", "pack.hpp", "exact.hpp", "homogeneous.hpp")
)
_MOST_WORK = 2.0**60
_FLAGS = ("-ffp-contract=off",)  # fused multiply-adds would round differently from machine to machine


@dataclass(frozen=True, slots=True)
class Waves:
    """Where each sequence of a problem, in its order, is computed; and what one degree for all would take."""

    wave: NDArray[np.int32]
    group: NDArray[np.int32]
    """numbered within its wave"""
    degree: NDArray[np.int32]
    """index into the problem's degrees"""
    static_ms: float
    adaptive_ms: float
    by_clock: bool = False
    """the search was ended by the clock"""
    exact: bool = False
    """every plan was looked at: no lock-step plan is shorter"""


def placements(milliseconds: float, num_slots: int) -> int:
    """The work that fits the time: a placement costs more where there are more groups to look at."""
    work = milliseconds * 36_000 / (1 + 0.12 * math.log2(max(1.0, num_slots / 64)))
    return int(min(work, _MOST_WORK))


def search(problem: StepProblem, *, milliseconds: float, seed: int, build: bool) -> Waves | None:
    """The best plan found in the given time, or None if there is none (a sequence longer than the memory).

    Raises:
        MissingDependencyError: the library is neither built nor can it be.
    """
    library = _library(build)
    num = len(problem.lengths)
    wave, group, degree = (np.empty(num, np.int32) for _ in range(3))
    report = np.zeros(4)
    stop = ctypes.c_int(0)
    times = np.ascontiguousarray(problem.times)
    degrees = np.array(problem.degrees, np.int32)
    call = partial(
        library.distrain_plan_waves,
        ctypes.c_int(problem.num_slots),
        ctypes.c_int(len(problem.degrees)),
        _address(degrees),
        _address(problem.capacities),
        ctypes.c_double(problem.cost.beta1),
        ctypes.c_int(num),
        _address(problem.lengths),
        _address(times),
        ctypes.c_int64(placements(milliseconds, problem.num_slots)),
        ctypes.c_double(milliseconds / 1e3),
        ctypes.c_uint64(seed % 2**64),
        ctypes.byref(stop),
        _address(wave),
        _address(group),
        _address(degree),
        _address(report),
    )
    with ThreadPoolExecutor(1, "sequence-plan") as thread:  # so that this one hears Ctrl-C
        try:
            failed = thread.submit(call).result()
        finally:
            stop.value = 1
    if failed:
        return None
    return Waves(
        wave,
        group,
        degree,
        static_ms=float(report[0]),
        adaptive_ms=float(report[1]),
        by_clock=bool(report[2]),
        exact=bool(report[3]),
    )


def build() -> None:
    """Compile the library where the cache lacks it, so that jobs find it."""
    _library(build=True)


@cache
def _library(build: bool) -> ctypes.CDLL:
    return native.load("sequence_waves", _SOURCES, build=build, flags=_FLAGS)


def _address(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
