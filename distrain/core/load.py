"""From a file, the environment and overrides to one RunConfig, with the origin of every value.

Later layers win: default < file < environment < ``--set``. Every layer is flattened to entries (dotted key,
value, origin) which one function checks against the dataclasses of ``config.py``, so a layer differs from the
others only in how it is read. Problems of all layers are collected and raised as one ConfigError: a user who
misspelt three keys learns of three.
"""

import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from .config import RunConfig, flatten
from .errors import Problem, nearest, raise_if

ENV_PREFIX = "DISTRAIN_"
_BOOLEANS = MappingProxyType({"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False})


@dataclass(frozen=True, slots=True)
class Loaded:
    """A config and, for each of its dotted keys, the words that say where the value came from."""

    config: RunConfig
    origins: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One assignment of one layer; ``typed`` is false where the value is text that still has to be parsed."""

    key: str
    value: Any
    origin: str
    typed: bool = True

    @property
    def got(self) -> str:
        return f"{self.key} = {self.value!r} ({self.origin})"


def load(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    check: Callable[[RunConfig], Iterable[Problem]] = lambda config: (),
) -> Loaded:
    """Read the config at ``path`` (.toml or .json); lay environment and overrides (``"a.b=5"``) over it.

    ``check`` says whether the values can work together (``checks.check_run``, say). It sees what could be read, so
    that a misspelt key does not hide an impossible value.

    Raises:
        ConfigError: lists every problem of every layer, then those of ``check``.
    """
    problems: list[Problem] = []
    entries = list(_file_entries(Path(path), problems))
    can_check = not problems
    entries += _environment_entries(os.environ if environ is None else environ)
    entries += _override_entries(overrides, problems)
    return _build(entries, problems, check if can_check else lambda config: ())


def parse(tables: Mapping[str, Any]) -> RunConfig:
    """The config written as plain tables, as ``config.nested`` gives them.

    Raises:
        ConfigError: lists every key or value that RunConfig does not know.
    """
    return _build(_table_entries(tables, lambda key: "tables"), [], lambda config: ()).config


def _build(
    entries: Iterable[_Entry], problems: list[Problem], check: Callable[[RunConfig], Iterable[Problem]]
) -> Loaded:
    """Check ``entries`` and apply them in order, the last one of a key winning; ``check`` has the last word."""
    values: dict[str, Any] = {}
    origins = dict.fromkeys(flatten(RunConfig()), "default")
    for entry in entries:
        key, kind = entry.key, _kinds().get(entry.key)
        if kind is None:
            problems.append(_unknown(entry))
            continue
        origins[key] = entry.origin
        if row_kind := _row_kind(kind):
            values[key] = tuple(_read_rows(entry, row_kind, problems))
            continue
        try:
            values[key] = _convert(entry.value, kind) if entry.typed else _from_text(entry.value, kind)
        except (ValueError, OverflowError):
            problems.append(_wrong_type(entry, kind))
    config = _assemble(values)
    raise_if([*problems, *check(config)])
    return Loaded(config, origins)


def _assemble(values: Mapping[str, Any]) -> RunConfig:
    """The RunConfig in which ``values``, by dotted key, replace the defaults."""
    config = RunConfig()
    for key, value in values.items():
        table, _, leaf = key.rpartition(".")
        place = replace(getattr(config, table), **{leaf: value}) if table else value
        config = replace(config, **{table or leaf: place})
    return config


@cache
def _kinds() -> Mapping[str, type]:
    """The type of every dotted key of RunConfig; constant, hence the cache."""
    kinds: dict[str, type] = {}
    for name, hint in get_type_hints(RunConfig).items():
        if is_dataclass(hint):
            kinds |= {f"{name}.{leaf}": kind for leaf, kind in get_type_hints(hint).items()}
        else:
            kinds[name] = hint
    return MappingProxyType(kinds)


def _row_kind(kind: type) -> type | None:
    """The dataclass of the rows of ``[[table.name]]``; None for a key with one value."""
    return next((each for each in get_args(kind) if isinstance(each, type)), None)


def _tables() -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in _kinds() if "." in key))


# -- layers --------------------------------------------------------------------------------------------------


def _file_entries(path: Path, problems: list[Problem]) -> Iterator[_Entry]:
    """Entries of the file; one that cannot be read adds a problem and yields nothing."""
    read = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix)
    if read is None:
        problems.append(
            Problem("this is not the name of a config file", str(path), "a file that ends in .toml or .json")
        )
        return
    try:
        text = path.read_text(encoding="utf-8")
        tables = read(text)
    except OSError as error:
        problems.append(
            Problem("the config file cannot be read", f"{path}: {error.strerror}", hint=_beside(path))
        )
        return
    except ValueError as error:  # covers both parsers, which name line and column, and text that is not UTF-8
        problems.append(
            Problem(f"the config file is not valid {path.suffix[1:].upper()}", f"{path}: {error}")
        )
        return
    if not isinstance(tables, dict):
        problems.append(Problem("the config file is not a table of keys", f"{path}: {type(tables).__name__}"))
        return
    lines = _key_lines(text) if path.suffix == ".toml" else {}
    yield from _table_entries(tables, lambda key: f"{path}:{lines[key]}" if key in lines else str(path))


def _beside(path: Path) -> str:
    """A hint that names the file most like ``path`` in its folder, if there is one."""
    if not path.parent.is_dir():
        return ""
    configs = {item.stem: item for item in path.parent.iterdir() if item.suffix in (".toml", ".json")}
    close = nearest(path.stem, configs)
    return str(configs[close]) if close else ""


def _table_entries(tables: Mapping[str, Any], origin_of: Callable[[str], str]) -> Iterator[_Entry]:
    """Entries of nested tables; ``origin_of`` says where a dotted key stands."""
    for name, value in tables.items():
        if isinstance(value, Mapping) and name in _tables():
            for leaf, item in value.items():
                key = f"{name}.{leaf}"
                yield _Entry(key, item, origin_of(key))
        else:
            yield _entry(name, value, origin_of(name), typed=True)


def _environment_entries(environ: Mapping[str, str]) -> Iterator[_Entry]:
    """``DISTRAIN_TRAIN__STEPS``, ``DISTRAIN_SEED``; other names without double underscore are not config."""
    top = {key for key in _kinds() if "." not in key} | {"parallel"}
    for variable, value in environ.items():
        key = variable.removeprefix(ENV_PREFIX).lower().replace("__", ".", 1)
        if variable.startswith(ENV_PREFIX) and ("." in key or key in top):
            yield _entry(key, value, f"environment {variable}", typed=False)


def _override_entries(overrides: Sequence[str], problems: list[Problem]) -> Iterator[_Entry]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals:
            yield _entry(key.strip(), value.strip(), f"--set {key.strip()}", typed=False)
        else:
            problems.append(
                Problem(
                    "an override has no value", f"--set {text}", "section.key=value", "--set train.steps=100"
                )
            )


def _entry(key: str, value: Any, origin: str, *, typed: bool) -> _Entry:
    """An entry, in which ``parallel = "auto"`` is read as its long form."""
    if (key, value) == ("parallel", "auto"):
        return _Entry("parallel.auto", True, origin)
    return _Entry(key, value, origin, typed)


def _key_lines(text: str) -> dict[str, int]:
    """Line of each table and ``key = value`` by dotted key; not a parser, so only origins may rest on it."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\[?\s*([\w.-]+)\s*\]", line):
            table = header[1] + "."
            lines.setdefault(header[1], number)
        elif key := re.match(r"\s*([\w.-]+)\s*=", line):
            lines.setdefault(table + key[1], number)
    return lines


# -- values --------------------------------------------------------------------------------------------------


def _read_rows(entry: _Entry, kind: type, problems: list[Problem]) -> Iterator[Any]:
    """Rows of a list of tables; variables and overrides spell it as JSON."""
    rows, kinds = entry.value, get_type_hints(kind)
    if not entry.typed:
        with suppress(ValueError):  # what is still text is refused below
            rows = json.loads(entry.value)
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        allowed = f"tables [[{entry.key}]]" + (" as a JSON list" if not entry.typed else "")
        problems.append(Problem(f"{entry.key} is a list of tables", entry.got, allowed))
        return
    for number, row in enumerate(rows, start=1):
        values: dict[str, Any] = {}
        for leaf, value in row.items():
            cell = _Entry(f"{entry.key}.{leaf}", value, f"table {number}, {entry.origin}")
            if leaf not in kinds:
                close = nearest(leaf, kinds)
                error = f"[[{entry.key}]] has no key {leaf}"
                problems.append(Problem(error, cell.got, ", ".join(kinds), close or ""))
                continue
            try:
                values[leaf] = _convert(value, kinds[leaf])
            except (ValueError, OverflowError):
                problems.append(_wrong_type(cell, kinds[leaf]))
        yield kind(**values)


def _convert(value: Any, kind: type) -> Any:
    """``value`` as ``kind``: an int may stand for a float, nothing else is converted."""
    if issubclass(kind, StrEnum):
        return kind(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(value)
    return value


def _from_text(text: str, kind: type) -> Any:
    """The value of type ``kind`` that a variable or an override spells."""
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise ValueError(text)
        return _BOOLEANS[text.lower()]
    return _convert(kind(text), kind)


# -- problems ------------------------------------------------------------------------------------------------


def _wrong_type(entry: _Entry, kind: type) -> Problem:
    if issubclass(kind, StrEnum):
        choices = [str(choice) for choice in kind]
        close = nearest(str(entry.value), choices)
        return Problem(
            f"{entry.key} knows no such choice",
            entry.got,
            ", ".join(choices),
            close and f"{entry.key} = {close}",
        )
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    return Problem(f"{entry.key} has the wrong type", entry.got, words[kind])


def _unknown(entry: _Entry) -> Problem:
    """Nearest match: among the table's keys if the table is known, otherwise a table or key of that name."""
    table, dot, leaf = entry.key.partition(".")
    if table in _tables():
        keys = [key.partition(".")[2] for key in _kinds() if key.startswith(f"{table}.")]
        if not dot:
            return Problem(
                f"{table} is a table, not a value", entry.got, "keys " + ", ".join(keys), f"[{table}]"
            )
        close = nearest(leaf, keys)
        hint = f"{table}.{close}" if close else _elsewhere(leaf)
        return Problem(f"[{table}] has no key {leaf}", entry.got, ", ".join(keys), hint)
    choices = [*(key for key in _kinds() if "." not in key), *_tables()]
    close = nearest(table, choices)
    hint = f"{close}.{leaf}" if close and leaf else close or _elsewhere(leaf or table)
    what = "table" if dot or isinstance(entry.value, Mapping) else "key or table"
    return Problem(f"there is no {what} {table}", entry.got, ", ".join(choices), hint)


def _elsewhere(leaf: str) -> str:
    """The first dotted key whose last part is ``leaf``: a right key under the wrong table."""
    return next((key for key in _kinds() if key.rpartition(".")[2] == leaf), "")
