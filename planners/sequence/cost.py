"""What a group of sequences costs: time and memory of FlexSP's model (arXiv 2412.01523, section 4.1).

A sequence of L tokens split over d devices takes::

    t(L, d) = (alpha1 L^2 + alpha2 L) / d  +  C L / (d v_d)        the second term only for d > 1

alpha1 is attention, alpha2 all that is linear in tokens, and C the megabytes that the all-to-alls move for a token:
queries, keys, values and outputs, forward and backward, in 2 bytes, so C = 4 * 2 * 2 * layers * hidden / 2^20. The
bandwidth v_d falls with the degree, steeply where a group leaves its node. A group takes the sum over its sequences
plus beta1, which is what a micro-batch costs whatever is in it (gathering parameters, launching kernels). Memory: a
group of degree d holds ``d * tokens_per_gpu`` tokens.

The presets are the constants that FlexSP's authors fitted on 64 A100s in 8 nodes; ``tokens_per_gpu`` of the presets
is what 30 GB leave beside the states of that model at a context of 192K tokens.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from distrain.core.errors import ConfigError, Problem, nearest, raise_if

Lengths = TypeVar("Lengths", float, NDArray[np.float64])

_A2A_BYTES = 4 * 2 * 2  # q, k, v and output; forward and backward; two bytes an element


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceCost:
    """Constants of the model, and the functions they make."""

    alpha1: float
    """ms for a token squared"""
    alpha2: float
    """ms for a token"""
    beta1: float
    """ms for a group, once a micro-batch"""
    layers: int
    hidden: int
    tokens_per_gpu: int
    """tokens that fit in the memory of one device"""
    bandwidth_gb_s: Mapping[int, float] = field(default_factory=dict)
    """all-to-all bandwidth of a device in a group of each degree; what is not listed is not used, except 1"""
    max_degree: int | None = None
    """no wider groups, for instance because there are only so many heads"""

    def degrees(self, num_slots: int) -> tuple[int, ...]:
        """Degrees that groups of ``num_slots`` devices may have, ascending."""
        most = num_slots if self.max_degree is None else min(num_slots, self.max_degree)
        return tuple(sorted(degree for degree in {1, *self.bandwidth_gb_s} if degree <= most))

    def sequence_ms(self, length: Lengths, degree: int) -> Lengths:
        """What a sequence of ``length`` tokens, or each of an array of them, adds to its group of ``degree``."""
        moved_ms = 0.0 if degree == 1 else self.megabytes_per_token / self.bandwidth_gb_s[degree]
        return (self.alpha1 * length + (self.alpha2 + moved_ms)) * length / degree

    def group_ms(self, lengths: Iterable[float], degree: int) -> float:
        """Time of a group of ``degree`` that computes sequences of these ``lengths``."""
        return sum(self.sequence_ms(length, degree) for length in lengths) + self.beta1

    def capacity(self, degree: int) -> int:
        """Tokens that a group of ``degree`` can hold."""
        return degree * self.tokens_per_gpu

    @property
    def megabytes_per_token(self) -> float:
        """What the all-to-alls of a step move for each token, all devices together; GB/s are MB/ms."""
        return _A2A_BYTES * self.layers * self.hidden / 2**20

    def to_toml(self) -> str:
        """The file that ``load`` reads."""
        keys = ("alpha1", "alpha2", "beta1", "layers", "hidden", "tokens_per_gpu")
        lines = [f"{key} = {getattr(self, key)!r}" for key in keys]
        if self.max_degree is not None:
            lines.append(f"max_degree = {self.max_degree}")
        table = [f"{degree} = {speed!r}" for degree, speed in sorted(self.bandwidth_gb_s.items())]
        return "\n".join([*lines, "", "[bandwidth_gb_s]", *table]) + "\n"


_A100 = MappingProxyType({2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87})

PRESETS: Mapping[str, SequenceCost] = MappingProxyType(
    {
        "7b": SequenceCost(
            alpha1=5.128e-6,
            alpha2=0.1839576,
            beta1=629.3563,
            layers=32,
            hidden=4096,
            tokens_per_gpu=6449,
            bandwidth_gb_s=_A100,
        ),
        "13b": SequenceCost(
            alpha1=9.2852e-6,
            alpha2=0.3060189,
            beta1=1132.5632,
            layers=40,
            hidden=5120,
            tokens_per_gpu=6483,
            bandwidth_gb_s=_A100,
        ),
        "30b": SequenceCost(
            alpha1=15.4262e-6,
            alpha2=0.8035742,
            beta1=2789.3644,
            layers=60,
            hidden=6656,
            tokens_per_gpu=6627,
            bandwidth_gb_s=_A100,
        ),
    }
)


def load(source: Path | str) -> SequenceCost:
    """The preset of that name, or the cost model of a TOML file.

    Raises:
        ConfigError: it is neither, or the file does not describe a cost model; lists every problem.
    """
    if str(source) in PRESETS:
        return PRESETS[str(source)]
    try:
        data = tomllib.loads(Path(source).read_text("utf-8-sig"))
    except (OSError, ValueError) as error:  # no UTF-8, no TOML, or a number of thousands of digits
        close = nearest(str(source).lower(), PRESETS)
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            "the cost model cannot be read",
            got=f"{source}: {why}",
            allowed=f"{', '.join(PRESETS)}, or a TOML file",
            hint=close and f"--cost {close}",
        ) from None
    raise_if(list(_problems(data)))
    table = data.get("bandwidth_gb_s", {})
    scalars = {key: data[key] for key in data.keys() - {"bandwidth_gb_s"}}
    return SequenceCost(
        **scalars, bandwidth_gb_s={int(degree): float(speed) for degree, speed in sorted(table.items())}
    )


def _is_number(value: object) -> bool:
    """Of a size that can be reckoned with; a whole number may be beyond every float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST_REAL


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_COUNT


_MOST_REAL, _MOST_COUNT = 1e300, 2**53
_REALS = ("alpha1", "alpha2", "beta1")
_COUNTS = ("layers", "hidden", "tokens_per_gpu", "max_degree")
_DEGREE = re.compile("[1-9][0-9]{0,8}")
_KEYS = (*_REALS, *_COUNTS, "bandwidth_gb_s")


def _problems(data: Mapping[str, Any]) -> Iterator[Problem]:
    for key in sorted(data.keys() - set(_KEYS)):
        close = nearest(key, _KEYS)
        yield Problem("the cost model has an unknown key", key, ", ".join(_KEYS), close and f"{close} = ...")
    for key in _KEYS:
        if key not in data and key not in ("max_degree", "bandwidth_gb_s"):
            yield Problem(f"the cost model lacks {key}", hint=f"{key} = ...")
    for key in _REALS:
        if key in data and not _is_number(data[key]):
            yield Problem(f"{key} is no time", f"{key} = {data[key]!r}"[:60], "0 to 1e300 ms")
    for key in _COUNTS:
        if key in data and not _is_whole(data[key]):
            yield Problem(f"{key} is no count", f"{key} = {data[key]!r}"[:60], "a whole number, 1 to 2^53")
    table = data.get("bandwidth_gb_s", {})
    if not isinstance(table, dict):
        yield Problem("bandwidth_gb_s is no table", repr(table), "GB/s for each degree")
        return
    for degree, speed in table.items():
        if not _DEGREE.fullmatch(degree):
            yield Problem(
                "bandwidth_gb_s has a key that is no degree", degree[:40], "a whole number, 1 or more"
            )
        if not _is_number(speed) or speed == 0:
            yield Problem("a bandwidth is not positive", f"{degree} = {speed!r}"[:60], "GB/s, more than 0")
