"""From a TOML file and overrides to a Scenario that can be simulated, or to every problem at once."""

import math
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args, get_type_hints

from distrain.core.errors import ConfigError, Problem, nearest, raise_if

from .mixes import MIXES
from .scenario import AUTO, Scenario

T = TypeVar("T")
MOST_FAILURES = 500_000
"""drawn for one seed: a gigabyte of what came of them"""

_Range = tuple[Callable[[float], bool], str]
_POSITIVE: _Range = (lambda value: value > 0, "more than 0")
_NOT_NEGATIVE: _Range = (lambda value: value >= 0, "0 or more")
_SHARE: _Range = (lambda value: 0 <= value <= 1, "0 to 1")
_COUNT: _Range = (lambda value: value >= 1, "1 or more")
_NUMBERS: tuple[tuple[str, _Range], ...] = (
    ("job.gpus", _COUNT),
    ("job.gpus_per_node", _COUNT),
    ("job.spare_nodes", _NOT_NEGATIVE),
    ("job.days", _POSITIVE),
    ("failures.scale", _NOT_NEGATIVE),
    ("failures.burstiness", (lambda value: 0.1 <= value <= 10, "0.1 to 10; 1 is Poisson")),
    ("failures.frailty", (lambda value: 0 <= value <= 100, "0 to 100")),
    ("failures.correlated", _SHARE),
    ("failures.rack_nodes", _COUNT),
    ("failures.repair_median_s", _POSITIVE),
    ("failures.repair_sigma", (lambda value: 0 <= value <= 10, "0 to 10")),
    ("recovery.crash_detect_s", _NOT_NEGATIVE),
    ("recovery.hang_detect_s", _NOT_NEGATIVE),
    ("recovery.corruption_detect_s", _NOT_NEGATIVE),
    ("recovery.diagnose_s", _NOT_NEGATIVE),
    ("recovery.restart_s", _NOT_NEGATIVE),
    ("checkpoint.stall_s", _NOT_NEGATIVE),
)
_IN_LISTS: Mapping[str, _Range] = MappingProxyType(
    {
        "per_1000_node_days": _NOT_NEGATIVE,
        "node_share": _SHARE,
        "restore_s": _NOT_NEGATIVE,
        "delay_s": _NOT_NEGATIVE,
        "every": _COUNT,
        "group_nodes": _COUNT,
        "max_lost": _NOT_NEGATIVE,
    }
)


def load_scenario(path: Path | None = None, *, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """The scenario of the file at ``path``, with ``overrides`` by dotted key (``"job.gpus"``) laid over it.

    Raises:
        ConfigError: lists every key and value that cannot be.
    """
    tables = _parse(path) if path else {}
    for key, value in (overrides or {}).items():
        section, _, leaf = key.partition(".")
        table = tables.get(section, {})
        tables[section] = {**table, leaf: value} if leaf and isinstance(table, Mapping) else value
    problems: list[Problem] = []
    scenario = _fill(Scenario(), tables, "", problems)
    raise_if([*problems, *_check(scenario)])
    return scenario


def _parse(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("the scenario cannot be read", got=f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError("the scenario is not valid TOML", got=f"{path}: {error}") from None


def _fill(default: T, table: Any, where: str, problems: list[Problem]) -> T:
    """``default`` with the values of ``table``; what cannot be read is left as it was."""
    if not isinstance(table, Mapping):
        problems.append(Problem(f"{where[:-1]} is a table, not a value", repr(table), hint=f"[{where[:-1]}]"))
        return default
    values: dict[str, Any] = {}
    for key, kind, value in _known(type(default), table, where, problems):
        current: Any = getattr(default, key)
        if isinstance(current, tuple):
            values[key] = _list(get_args(kind)[0], value, f"{where}{key}", problems)
        elif is_dataclass(current):
            values[key] = _fill(current, value, f"{where}{key}.", problems)
        else:
            values[key] = _value(kind, value, f"{where}{key}", current, problems)
    return replace(default, **values)  # type: ignore[type-var]  # a dataclass, which T cannot say


def _known(
    kind: type, table: Mapping[str, Any], where: str, problems: list[Problem]
) -> Iterator[tuple[str, Any, Any]]:
    """Name, type and value of each key that ``kind`` has; the others are problems."""
    hints = get_type_hints(kind)
    for key, value in table.items():
        if key in hints:
            yield key, hints[key], value
        else:
            close = nearest(key, hints)
            hint = close and f"{where}{close}"
            problems.append(Problem(f"there is no {where}{key}", repr(value), ", ".join(hints), hint))


def _list(kind: type[T], tables: Any, where: str, problems: list[Problem]) -> tuple[T, ...]:
    """An array of tables, each of which is one ``kind``."""
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        problems.append(Problem(f"{where} is not an array of tables", repr(tables), hint=f"[[{where}]]"))
        return ()
    found = []
    for index, table in enumerate(tables):
        here = f"{where}[{index}]"
        before = len(problems)
        known = list(_known(kind, table, f"{here}.", problems))
        values = {key: _value(hint, value, f"{here}.{key}", None, problems) for key, hint, value in known}
        needed = [field.name for field in fields(kind) if field.default is MISSING]  # type: ignore[arg-type]
        if missing := [name for name in needed if name not in table]:
            problems.append(Problem(f"{here} lacks {', '.join(missing)}", str(table)))
        if len(problems) == before:
            found.append(kind(**values))
    return tuple(found)


def _value(kind: Any, value: Any, where: str, default: Any, problems: list[Problem]) -> Any:
    """``value`` as ``kind``; ``default`` and a problem if it is none."""
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        if value in list(kind):
            return kind(value)
        problems.append(
            Problem(f"{where} knows no such choice", repr(value), ", ".join(kind), nearest(str(value), kind))
        )
        return default
    if kind is str or kind is int:
        good, words = type(value) is kind, "text" if kind is str else "a whole number"
    else:
        good = type(value) in (int, float) and math.isfinite(value)
        words = "a number"
        if kind is not float:
            good, words = good or value == AUTO, f"a number or {AUTO!r}"
    if not good:
        problems.append(Problem(f"{where} has the wrong type", repr(value), words))
        return default
    return float(value) if type(value) is int and kind is not int else value


def _check(scenario: Scenario) -> Iterator[Problem]:
    """What is out of range or cannot work together."""
    for key, (good, allowed) in _NUMBERS:
        section, _, leaf = key.partition(".")
        value = getattr(getattr(scenario, section), leaf)
        if not good(value):
            yield Problem(f"{key} is out of range", f"{value:g}", allowed)
    lists = {"failures.classes": scenario.failures.classes, "checkpoint.levels": scenario.checkpoint.levels}
    for where, items in lists.items():
        yield from _check_list(where, items)
    job, failures = scenario.job, scenario.failures
    if job.gpus >= 1 and job.gpus_per_node >= 1 and job.gpus % job.gpus_per_node:
        got = f"job.gpus = {job.gpus}, job.gpus_per_node = {job.gpus_per_node}"
        yield Problem("the GPUs do not fill whole nodes", got, f"a multiple of {job.gpus_per_node}")
    if failures.mix not in MIXES:
        yield Problem(
            "failures.mix knows no such mix", failures.mix, ", ".join(MIXES), nearest(failures.mix, MIXES)
        )
    elif not failures.trace and job.gpus_per_node >= 1:
        yield from _check_amount(scenario)
    if failures.trace and not Path(failures.trace).is_file():
        yield Problem(
            "the trace is no file", failures.trace, hint="failures.trace, relative to where you are"
        )
    yield from _check_interval(scenario)


def _check_list(where: str, items: tuple[Any, ...]) -> Iterator[Problem]:
    names = [item.name for item in items]
    if len(set(names)) < len(names):
        yield Problem(f"two of {where} have the same name", ", ".join(names))
    for index, item in enumerate(items):
        for leaf, (good, allowed) in _IN_LISTS.items():
            value = getattr(item, leaf, None)
            if value is not None and not good(value):
                yield Problem(f"{where}[{index}].{leaf} is out of range", f"{value:g}", allowed)


def _check_amount(scenario: Scenario) -> Iterator[Problem]:
    rate = sum(each.per_1000_node_days for each in scenario.classes) / 1000
    expected = rate * (scenario.num_nodes + scenario.job.spare_nodes) * scenario.job.days
    if expected > MOST_FAILURES:
        got = f"{expected:.3g} failures to be expected"
        yield Problem("there are too many failures to simulate", got, f"at most {MOST_FAILURES}")


def _check_interval(scenario: Scenario) -> Iterator[Problem]:
    levels, interval_s = scenario.checkpoint.levels, scenario.checkpoint.interval_s
    if not levels:
        yield Problem("there is no level to save at", "checkpoint.levels = []", hint="[[checkpoint.levels]]")
    elif not isinstance(interval_s, str) and all(level.every >= 1 for level in levels):
        least_s = scenario.shortest_interval_s
        if interval_s < least_s:
            allowed = f"{least_s:g} or more, which is what the levels can follow, or {AUTO!r}"
            yield Problem("checkpoint.interval_s is too short", f"{interval_s:g}", allowed)
