"""State that is not tensors, as plain JSON and back, exactly and without pickle.

Unpickling a checkpoint runs whatever code its author wished; reading JSON cannot. What trainers keep beside tensors
(step counts, learning rates, schedulers, random generators, positions of loaders) is made of a few types, and those
round-trip here bit by bit. Everything else is refused when it is saved, with the path of each value, so that nobody
learns at restore what a checkpoint lacks.

None, bool, str, list, finite floats, small ints, and dicts with sorted string keys look in JSON as they do in Python.
All others are an object with one key that starts with ``$``::

    (1, 2)                    {"$tuple": [1, 2]}
    {"lr": 1, "eps": 2}       {"$dict": [["lr", 1], ["eps", 2]]}
    float("inf")              {"$float": "inf"}
    2**100                    {"$int": "0x10000000000000000000000000"}
    b"ab"                     {"$bytes": "YWI="}
    numpy.float32(1)          {"$scalar": ["<f4", "AACAPw=="]}
    numpy.zeros((0, 3))       {"$array": ["<f8", [0, 3], ""]}
    torch.bfloat16            {"$dtype": "bfloat16"}

Dicts keep their order, even if whoever writes the JSON sorts keys. Tensors are refused: they belong into boxes, or,
where they are small and on the CPU, into a numpy array (``torch.get_rng_state().numpy()``). torch is touched only for
values that are torch's own.
"""

import base64
import binascii
import math
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from distrain.core.errors import ConfigError, DistrainError, Problem, raise_if

from .errors import DamageError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_DEPTH = 100
MAX_VALUES = 1_000_000
MAX_BYTES = 64 << 20
"""of bytes, arrays and long numbers together"""

_EXACT_INT = 2**53  # beyond it, JSON readers of other languages would round
_ARRAY_KINDS = "biufc"
_ALLOWED = (
    "None, bool, int, float, str, bytes, list, tuple, dict, OrderedDict, Counter, arrays and scalars of numpy"
)
_DICTS: dict[str, Callable[[Iterable[tuple[Any, Any]]], dict[Any, Any]]] = {
    "$dict": dict,
    "$ordered_dict": OrderedDict,
    "$counter": lambda pairs: Counter(dict(pairs)),
}
_DICT_TAGS: dict[type, str] = {dict: "$dict", OrderedDict: "$ordered_dict", Counter: "$counter"}


def encode(value: object, *, name: str = "state") -> Json:
    """``value`` as JSON from which ``decode`` makes an equal value of the same types.

    Raises:
        ConfigError: it holds something that has no safe form, or is larger than a manifest should carry. Lists every
            such value by its path, which begins with ``name``: ``optimizer['param_groups'][0]['hook']``.
    """
    encoder = _Encoder()
    try:
        encoded = encoder.value(value, name, 0)
    except _TooLargeError as stop:
        raise ConfigError(
            str(stop), got=stop.got, allowed=stop.allowed, hint="keep large state in tensors"
        ) from None
    raise_if(encoder.problems)
    return encoded


def decode(encoded: object, *, name: str = "state") -> Any:
    """The value that ``encode`` turned into ``encoded``.

    Raises:
        DamageError: it is not what ``encode`` writes, or exceeds the limits; names the path like ``encode``.
    """
    try:
        return _Decoder().value(encoded, name, 0)
    except _TooLargeError as stop:
        raise DamageError(str(stop), got=stop.got, allowed=stop.allowed) from None


class _TooLargeError(DistrainError):
    def __init__(self, path: str, what: str, limit: int) -> None:
        super().__init__(f"{_short(path)} cannot be kept in a manifest: it has too {what}")
        self.got, self.allowed = f"more than {limit}", f"at most {limit}"


@dataclass(slots=True)
class _Meter:
    """Counts what has passed, in both directions alike: what can be written can be read."""

    num_values: int = 0
    num_bytes: int = 0

    def enter(self, path: str, depth: int) -> None:
        if depth > MAX_DEPTH:  # also what a list that contains itself ends in
            raise _TooLargeError(path, "many levels", MAX_DEPTH)
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise _TooLargeError(path, "many values", MAX_VALUES)

    def weigh(self, path: str, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        if self.num_bytes > MAX_BYTES:
            raise _TooLargeError(path, "many bytes", MAX_BYTES)


@dataclass(slots=True)
class _Encoder(_Meter):
    problems: list[Problem] = field(default_factory=list)

    def value(self, value: Any, path: str, depth: int) -> Json:
        self.enter(path, depth)
        kind = type(value)  # exactly: a subclass (an enum, a named tuple) would not come back as itself
        if value is None or value is True or value is False:
            return value
        if kind is str:
            return self._text(value, path)
        if kind is int:
            return self._int(value, path)
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if kind is list or kind is tuple:
            items = [self.value(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
            return items if kind is list else {"$tuple": items}
        if kind in _DICT_TAGS:
            return self._dict(value, path, depth)
        if kind is bytes:
            return {"$bytes": self._base64(value, path)}
        if kind is np.ndarray and value.dtype.kind in _ARRAY_KINDS:
            return {"$array": [value.dtype.str, list(value.shape), self._base64(value.tobytes(), path)]}
        if isinstance(value, np.generic) and value.dtype.kind in _ARRAY_KINDS:
            return {"$scalar": [value.dtype.str, self._base64(value.tobytes(), path)]}
        if named := self._of_torch(value):
            return named
        self._refuse(value, path)
        return None

    def _text(self, value: str, path: str) -> Json:
        try:
            num_bytes = len(value.encode())
        except UnicodeEncodeError:  # half of a surrogate pair: a file name, say, that is not UTF-8
            return {"$str": self._base64(value.encode("utf-8", "surrogatepass"), path)}
        self.weigh(path, num_bytes)
        return value

    def _int(self, value: int, path: str) -> Json:
        if abs(value) < _EXACT_INT:
            return value
        self.weigh(path, value.bit_length() // 4)
        return {"$int": hex(value)}

    def _dict(self, value: Mapping[Any, Any], path: str, depth: int) -> Json:
        tag = _DICT_TAGS[type(value)]
        if (
            tag == "$dict"
            and all(type(key) is str and _is_plain_key(key) for key in value)
            and _is_sorted(value)
        ):
            return {key: self.value(item, f"{path}[{key!r}]", depth + 1) for key, item in value.items()}
        pairs: list[Json] = [
            [
                self.value(key, f"key {_shown(key)} of {path}", depth + 1),
                self.value(item, f"{path}[{_shown(key)}]", depth + 1),
            ]
            for key, item in value.items()
        ]
        return {tag: pairs}

    def _base64(self, data: bytes, path: str) -> str:
        self.weigh(path, len(data))
        return base64.b64encode(data).decode()

    def _of_torch(self, value: Any) -> Json:
        torch = sys.modules.get("torch")  # a value of torch's cannot exist before torch is loaded
        if torch is None:
            return None
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"$device": str(value)}
        if type(value) is torch.Size:
            return {"$size": list(value)}
        return None

    def _refuse(self, value: object, path: str) -> None:
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        hint = "keep its name or its parts instead"
        if kind.startswith("torch.") and hasattr(value, "untyped_storage"):
            hint = "a tensor goes into the state dict as a tensor, or here as .cpu().numpy() if it is small"
        self.problems.append(
            Problem(f"{_short(path)} cannot be saved without pickle", got=kind, allowed=_ALLOWED, hint=hint)
        )


class _Decoder(_Meter):
    __slots__ = ()

    def value(self, encoded: Any, path: str, depth: int) -> Any:
        self.enter(path, depth)
        kind = type(encoded)
        if encoded is None or kind in (bool, int, float):
            return encoded
        if kind is str:
            self.weigh(path, len(encoded))
            return encoded
        if kind is list:
            return [self.value(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(encoded)]
        if kind is not dict:
            raise _damaged(path, f"a {kind.__name__}")
        if all(type(key) is str and _is_plain_key(key) for key in encoded):
            return {key: self.value(item, f"{path}[{key!r}]", depth + 1) for key, item in encoded.items()}
        return self._tagged(encoded, path, depth)

    def _tagged(self, encoded: dict[Any, Any], path: str, depth: int) -> Any:
        (tag, payload), *others = encoded.items()
        if others:
            raise _damaged(path, f"an object of the keys {', '.join(map(str, encoded))[:200]}")
        if tag == "$tuple" and type(payload) is list:
            return tuple(self.value(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(payload))
        if tag in _DICTS and type(payload) is list:
            return self._dict(tag, payload, path, depth)
        try:
            return self._leaf(tag, payload, path)
        except (TypeError, ValueError, AttributeError, OverflowError, KeyError) as error:
            raise _damaged(path, f"{str(encoded)[:200]} ({error})") from error

    def _dict(self, tag: str, payload: list[Any], path: str, depth: int) -> Any:
        pairs = []
        for i, pair in enumerate(payload):
            if type(pair) is not list or len(pair) != 2:
                raise _damaged(f"{path}[{i}]", str(pair)[:200])
            key = self.value(pair[0], f"key {i} of {path}", depth + 1)
            pairs.append((key, self.value(pair[1], f"{path}[{_shown(key)}]", depth + 1)))
        try:
            made = _DICTS[tag](pairs)
        except TypeError as error:
            raise _damaged(path, f"a key that cannot be one ({error})") from error
        if len(made) != len(pairs):
            raise _damaged(path, "a key that appears twice")
        return made

    def _leaf(self, tag: str, payload: Any, path: str) -> Any:
        match tag, payload:
            case "$float", "inf" | "-inf" | "nan":
                return float(payload)
            case "$int", str():
                self.weigh(path, len(payload))
                return int(payload, 16)
            case "$bytes", str():
                return self._bytes(payload, path)
            case "$str", str():
                return self._bytes(payload, path).decode("utf-8", "surrogatepass")
            case "$scalar", [str(dtype), str(data)]:
                return self._array(dtype, [], data, path)[()]
            case "$array", [str(dtype), list(shape), str(data)]:
                return self._array(dtype, shape, data, path)
            case "$dtype" | "$device" | "$size", _:
                return _to_torch(tag, payload)
        raise ValueError("no such form")

    def _bytes(self, text: str, path: str) -> bytes:
        self.weigh(path, len(text) * 3 // 4)
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(str(error)) from error

    def _array(self, dtype: str, shape: list[Any], data: str, path: str) -> Any:
        if not re.fullmatch(f"[<>|=][{_ARRAY_KINDS}][0-9]{{1,2}}", dtype):
            raise ValueError(f"no such dtype: {dtype[:20]}")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"no such shape: {shape}")
        flat = np.frombuffer(self._bytes(data, path), np.dtype(dtype))
        return flat.reshape(shape).copy()  # its own memory, writable


def _to_torch(tag: str, payload: Any) -> Any:
    import torch  # whoever asks for a torch value has use for torch

    if tag == "$size":
        if type(payload) is not list or not all(type(size) is int for size in payload):
            raise ValueError("no such size")
        return torch.Size(payload)
    if type(payload) is not str:
        raise ValueError("no such name")
    if tag == "$device":
        try:
            return torch.device(payload)
        except RuntimeError as error:
            raise ValueError("no such device") from error
    found = getattr(torch, payload, None)
    if not isinstance(found, torch.dtype):
        raise ValueError("no such dtype")
    return found


def _is_plain_key(key: str) -> bool:
    return not key.startswith("$") and key.isascii()  # a lone surrogate would not survive as a key of JSON


def _is_sorted(keys: Iterable[str]) -> bool:
    return all(first < second for first, second in pairwise(keys))


def _damaged(path: str, got: str) -> DamageError:
    return DamageError(
        f"the saved state is damaged at {_short(path)}", got=got, allowed="what a checkpoint writes"
    )


def _shown(key: object) -> str:
    try:
        return repr(key)
    except Exception:  # a key may be of any class; and Python does not print a number of 5000 digits
        return f"a {type(key).__name__}"


def _short(path: str) -> str:
    return path if len(path) <= 300 else f"{path[:200]} ... {path[-90:]}"
