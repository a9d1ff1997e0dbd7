"""Lengths of documents for planner benchmarks: drawn by seed, so that everybody plans the same batches.

Lengths are rounded up to 128 tokens and longer ones than the context dropped, as FlexSP's trainer does on 64 devices;
those of the standard library are the sizes in bytes of its own files (one token a byte), as they are.
"""

import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Lengths = NDArray[np.float64]

CONTEXT = 192_000
_ROUND = 128

# Quantiles of a million Wikipedia documents in tokens. The upper half is interpolated as a piecewise Pareto tail (the
# logarithm of the length over that of the share that is longer), which meets the shares of documents longer than 8K,
# 32K and 128K to a tenth; the lower half is that of a log-normal.
_WIKIPEDIA = {
    0.0: 8,
    0.01: 21,
    0.1: 77,
    0.25: 164,
    0.5: 347,
    0.9: 2112,
    0.99: 10_919,
    0.999: 37_353,
    0.99995: 131_072,
}
_LONGEST = {0.999999: 1_820_000}


def draw(kind: str, seed: int, *, num: int = 512, context: int = CONTEXT) -> list[int]:
    """``num`` lengths of a kind."""
    random = np.random.default_rng(seed)
    if kind == "stdlib":
        return _standard_library(random, num, context)
    found: list[int] = []
    while len(found) < num:
        drawn = _KINDS[kind](random, 2 * num)
        padded = np.ceil(drawn / _ROUND) * _ROUND
        found += [int(length) for length in padded[padded <= context - _ROUND]]
    if kind == "single-giant":
        found[num // 2] = (context - 2 * _ROUND) // _ROUND * _ROUND
    return found[:num]


def _standard_library(random: Generator, num: int, context: int) -> list[int]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    sizes = sorted(path.stat().st_size for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    fitting = [size for size in sizes if 0 < size <= context]
    return [int(size) for size in random.choice(fitting, num)]


def _bimodal(random: Generator, num: int) -> Lengths:
    long = random.random(num) < 0.08
    return np.where(long, random.lognormal(10.6, 0.5, num), random.lognormal(6.5, 0.7, num))


def _wikipedia(random: Generator, num: int) -> Lengths:
    known = _WIKIPEDIA | _LONGEST
    rarity = -np.log1p(-np.array(list(known)))
    return np.exp(np.interp(-np.log1p(-random.random(num)), rarity, np.log(list(known.values()))))


_KINDS: Mapping[str, Callable[[Generator, int], Lengths]] = {
    "log-normal": lambda random, num: random.lognormal(7.35, 1.75, num) + 16,
    "pareto": lambda random, num: 600 * (1 + random.pareto(1.1, num)),
    "bimodal": _bimodal,
    "single-giant": lambda random, num: random.lognormal(6.5, 1.0, num),
    "wikipedia": _wikipedia,
}

FROZEN: tuple[tuple[str, int], ...] = (
    ("log-normal", 101),
    ("log-normal", 102),
    ("log-normal", 103),
    ("pareto", 101),
    ("pareto", 102),
    ("pareto", 103),
    ("bimodal", 101),
    ("bimodal", 102),
    ("bimodal", 103),
    ("single-giant", 101),
    ("single-giant", 102),
    ("stdlib", 101),
    ("stdlib", 102),
)
"""kind and seed of the frozen set; none of them was looked at while the planner was tuned"""
