"""From a TOML or JSON file to a FaultPlan, with every problem of the file at once.

What cannot be read has its default and is noted as unread, so that everything else that is wrong is still found.
"""

import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distrain.core.errors import ConfigError, Problem, nearest, raise_if
from distrain.core.vocabulary import FaultKind, IncidentClass

from .capabilities import Capabilities
from .checks import Entry, JobShape, check_entries
from .plan import VERSION, At, Expect, Fault, FaultPlan, Target

_Schema = Mapping[str, tuple[Callable[[Any], Any], str]]


def load(path: Path, *, job: JobShape | None, capabilities: Capabilities | None) -> FaultPlan:
    """``FaultPlan.load``."""
    read = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix)
    if read is None:
        raise ConfigError(
            "this is not the name of a fault plan",
            got=str(path),
            allowed="a file that ends in .toml or .json",
        )
    try:
        tables = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("the fault plan cannot be read", got=f"{path}: {error.strerror}") from None
    except ValueError as error:  # of both parsers, and text that is not UTF-8
        form = path.suffix[1:].upper()
        raise ConfigError(f"the fault plan is not valid {form}", got=f"{path}: {error}") from None
    problems: list[Problem] = []
    seed, entries = read_tables(tables, problems)
    if job is not None:
        problems += check_entries(entries, job, capabilities=capabilities)
    raise_if(problems)
    return _plan(seed, entries)


def parse(tables: Any) -> FaultPlan:
    """``FaultPlan.from_json``."""
    problems: list[Problem] = []
    seed, entries = read_tables(tables, problems)
    raise_if(problems)
    return _plan(seed, entries)


def _plan(seed: int, entries: Sequence[Entry]) -> FaultPlan:
    return FaultPlan(tuple(entry.fault for entry in entries if entry.fault), seed=seed)


def read_tables(tables: Any, problems: list[Problem]) -> tuple[int, list[Entry]]:
    """Seed and faults of a plan as tables; what cannot be read becomes a problem."""
    found = _fields(tables, _PLAN, "", problems)
    if found.get("version", VERSION) != VERSION:
        problems.append(Problem("the plan has another version", str(found["version"]), str(VERSION)))
    faults = enumerate(found.get("faults", ()))
    return found.get("seed", 0), [_entry(table, number, problems) for number, table in faults]


def _entry(table: Any, number: int, problems: list[Problem]) -> Entry:
    place, unread = f"faults[{number}]", set()
    found = _fields(table, _FAULT, place, problems)
    if isinstance(table, Mapping):
        unread |= table.keys() - found.keys()
        if "kind" not in table:
            problems.append(Problem(f"{place} has no kind", allowed=", ".join(FaultKind)))
    for name, schema, form in (("target", _TARGET, Target), ("at", _AT, At), ("expect", _EXPECT, Expect)):
        if name in found:
            before = len(problems)
            found[name] = form(**_fields(found[name], schema, f"{place}.{name}", problems))
            unread |= {name} if len(problems) > before else set()
    return Entry(
        number=number,
        fault=Fault(**found) if "kind" in found else None,
        target=found.get("target", Target()),
        unread=frozenset(unread),
    )


def _fields(table: Any, schema: _Schema, place: str, problems: list[Problem]) -> dict[str, Any]:
    """The values of ``table`` that ``schema`` knows and can read; ``place`` is where it stands."""
    if not isinstance(table, Mapping):
        problems.append(Problem(f"{place or 'the plan'} is not a table of keys", repr(table)[:80]))
        return {}
    found: dict[str, Any] = {}
    dot = f"{place}." if place else ""
    for key, value in table.items():
        if key not in schema:
            close = nearest(str(key), schema)
            problems.append(
                Problem(
                    f"there is no key {dot}{key}", repr(value)[:80], ", ".join(schema), close and dot + close
                )
            )
            continue
        convert, allowed = schema[key]
        try:
            found[key] = convert(value)
        except (ValueError, TypeError):
            close = nearest(str(value), allowed.split(", "))
            problems.append(
                Problem(
                    f"{dot}{key} cannot be this", repr(value)[:80], allowed, close and f'{key} = "{close}"'
                )
            )
    return found


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(value)
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    return value


def _ranks(value: Any) -> tuple[int, ...]:
    return tuple(_whole(item) for item in _list(value))


def _link(value: Any) -> tuple[int, int]:
    first, second = _ranks(value)
    return first, second


def _table(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(value)
    return MappingProxyType(dict(value))


_PLAN: _Schema = MappingProxyType(
    {
        "version": (_whole, str(VERSION)),
        "seed": (_whole, "a whole number"),
        "faults": (_list, "a list of tables: [[faults]]"),
    }
)
_FAULT: _Schema = MappingProxyType(
    {
        "kind": (FaultKind, ", ".join(FaultKind)),
        "target": (_table, "a table"),
        "at": (_table, "a table"),
        "duration_s": (_number, "a finite number of seconds"),
        "probability": (_number, "a number from 0 to 1"),
        "params": (_table, "a table"),
        "expect": (_table, "a table"),
    }
)
_TARGET: _Schema = MappingProxyType(
    {
        "ranks": (_ranks, "a list of ranks: [0, 3]"),
        "node": (_whole, "the rank of a node"),
        "link": (_link, "two node ranks: [0, 1]"),
        "role": (_text, "trainer, keeper"),
        "where": (_text, "between, in_collective"),
        "phase": (_text, "start, data, gradients"),
    }
)
_AT: _Schema = MappingProxyType(
    {
        "step": (_whole, "a step, from 1"),
        "after_s": (_number, "a finite number of seconds"),
        "op": (_whole, "the number of an operation, from 1"),
    }
)
_EXPECT: _Schema = MappingProxyType(
    {
        "incident": (IncidentClass, ", ".join(IncidentClass)),
        "suspects": (_ranks, "a list of ranks: [0, 3]"),
        "within_s": (_number, "a finite number of seconds"),
    }
)
