"""Reading JSON that anybody may have written.

A manifest comes from a disk that others can write to, and its numbers end up as sizes, offsets and indices. So it is
parsed strictly (no duplicate keys, no NaN, bounded depth), and every value passes one of these small checks before it
is used. Each raises DamageError with the place in the document.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from .errors import DamageError

Json = Any
"""what ``json.loads`` returns"""

LARGEST = 2**62
"""no size, offset or count goes beyond; sums of two still fit an int64"""

T = TypeVar("T")
_SHOWN = 80  # characters of a wrong value in a message


def canonical(value: Json) -> bytes:
    """The one spelling of ``value`` over which digests are taken."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    ).encode()


def parse(data: bytes, what: str) -> Json:
    """The document in ``data``, or DamageError."""
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except (ValueError, RecursionError) as cause:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DamageError(f"{what} is not valid JSON", got=str(cause)[:_SHOWN]) from None


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return table


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def refuse(what: str, value: object, allowed: str) -> NoReturn:
    """Raise the DamageError that says ``what`` is wrong."""
    shown = repr(value) if not isinstance(value, (dict, list)) else f"{type(value).__name__} of {len(value)}"
    raise DamageError(f"{what} is wrong", got=shown[:_SHOWN], allowed=allowed)


def record(value: Json, what: str, *names: str) -> Mapping[str, Json]:
    """An object with exactly the keys ``names``."""
    if not isinstance(value, dict):
        refuse(what, value, "an object")
    if value.keys() != set(names):
        refuse(f"{what}: the set of keys", sorted(value), ", ".join(sorted(names)))
    return value


def table(value: Json, what: str) -> Mapping[str, Json]:
    """An object with any keys."""
    if not isinstance(value, dict):
        refuse(what, value, "an object")
    return value


def array(value: Json, what: str, *, length: int | None = None) -> list[Json]:
    """A list, of ``length`` if given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        refuse(what, value, "a list" if length is None else f"a list of {length}")
    return value


def integer(value: Json, what: str, *, low: int = 0, high: int = LARGEST) -> int:
    """An int from ``low`` to ``high``; a bool is none."""
    if type(value) is not int or not low <= value <= high:
        refuse(what, value, f"an integer from {low} to {high}")
    return value


def integers(value: Json, what: str) -> tuple[int, ...]:
    """A list of ints from 0 on."""
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v <= LARGEST for v in value):
        refuse(what, value, "a list of integers from 0 on")
    return tuple(value)


def number(value: Json, what: str) -> float:
    """A finite number; a bool is none."""
    if type(value) not in (int, float):
        refuse(what, value, "a number")
    return float(value)


def text(value: Json, what: str, *, longest: int = 4096) -> str:
    """A string of 1 to ``longest`` characters without NUL."""
    if not isinstance(value, str) or not 1 <= len(value) <= longest or "\0" in value:
        refuse(what, value, f"a string of 1 to {longest} characters")
    return value


def matching(value: Json, what: str, pattern: Callable[[str], T | None], allowed: str) -> str:
    """A string that ``pattern`` (``re.compile(...).fullmatch``) accepts."""
    if not isinstance(value, str) or not pattern(value):
        refuse(what, value, allowed)
    return value
