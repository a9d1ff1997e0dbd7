"""Failures that were recorded, or drawn once to be replayed elsewhere: JSON lines.

One failure a line, in any order: ``{"t_s": 8041.5, "node": 17, "class": "gpu_hbm3", "repair_s": 90000}``. ``node`` is
a number below nodes + spares or a name (names are numbered as they appear), ``repair_s`` is how long the node is away,
and 0, the default, says that it stays. A class may bear any name. One that the mix knows shows as it does there;
``hang``, ``corruption``, ``planned`` and the incident classes of detectors show as what they are; all others are
crashes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from distrain.core.errors import ConfigError, Problem, raise_if
from distrain.core.vocabulary import IncidentClass

from .failures import FailureClass, Failures, Shows

_ALLOWED = '{"t_s": seconds, "node": number or name, "class": name, "repair_s": seconds}'
_SHOWN = 10
_SHOWS: Mapping[str, Shows] = MappingProxyType(
    {
        **{str(shows): shows for shows in Shows},
        IncidentClass.FROZEN: Shows.HANG,
        IncidentClass.NONCOMM_HANG: Shows.HANG,
        IncidentClass.COMM_HANG: Shows.HANG,
        IncidentClass.DESYNC: Shows.HANG,
        IncidentClass.DATA_STALL: Shows.HANG,
        IncidentClass.NUMERIC: Shows.CORRUPTION,
        IncidentClass.SILENT_CORRUPTION: Shows.CORRUPTION,
    }
)


def read_trace(
    path: Path, *, known: Iterable[FailureClass], num_nodes: int, horizon_s: float = math.inf
) -> Failures:
    """The failures in ``path`` before ``horizon_s``, on ``num_nodes`` nodes, spares included.

    Raises:
        ConfigError: names each line that is no failure, up to ten.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError("the trace cannot be read", got=f"{path}: {error}") from None
    problems: list[Problem] = []
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row, problem = _parse(line)
            rows += [row] if row else []
            problems += [Problem(problem, f"{path}:{number}: {line[:80]}", _ALLOWED)] if problem else []
    nodes, more = _number([row["node"] for row in rows], num_nodes, path)
    problems += more
    if len(problems) > _SHOWN:
        problems = [*problems[:_SHOWN], Problem(f"and {len(problems) - _SHOWN} more problems in {path}")]
    raise_if(problems)
    return _failures(rows, nodes, {each.name: each for each in known}, horizon_s)


def write_trace(path: Path, failures: Failures) -> None:
    """Write ``failures`` so that ``read_trace`` gives them back."""
    names = [each.name for each in failures.classes]
    columns = (failures.t_s, failures.node, failures.kind, failures.repair_s)
    with path.open("w", encoding="utf-8") as file:
        for t_s, node, kind, repair_s in zip(*(column.tolist() for column in columns), strict=True):
            line = {"t_s": t_s, "node": node, "class": names[kind], "repair_s": repair_s}
            file.write(json.dumps(line) + "\n")


def _parse(line: str) -> tuple[Mapping[str, Any] | None, str]:
    """A row, or what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError:
        return None, "a line of the trace is not JSON"
    if not isinstance(row, dict):
        return None, "a line of the trace is not an object"
    if unknown := sorted(set(row) - {"t_s", "node", "class", "repair_s"}):
        return None, f"a line of the trace has unknown keys: {', '.join(unknown)}"
    row = {"repair_s": 0.0, **row}
    for key in ("t_s", "repair_s"):
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            return None, f"{key} of a line of the trace is not a number of seconds"
    if type(row.get("node")) not in (int, str) or not isinstance(row.get("class"), str):
        return None, "a line of the trace lacks its node or its class"
    return row, ""


def _number(names: list[int | str], num_nodes: int, path: Path) -> tuple[list[int], list[Problem]]:
    """Numbers of the nodes below ``num_nodes``."""
    if all(isinstance(name, int) for name in names):
        wrong = sorted({name for name in names if isinstance(name, int) and not 0 <= name < num_nodes})
        allowed = f"0 to {num_nodes - 1}: nodes, then spares"
        found = [Problem("the trace names nodes that the job does not have", f"{path}: {wrong[:5]}", allowed)]
        return [int(name) for name in names], found if wrong else []
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    found = [
        Problem("the trace names more nodes than the job has", f"{path}: {len(numbers)}", f"{num_nodes}")
    ]
    return [numbers[name] for name in names], found if len(numbers) > num_nodes else []


def _failures(
    rows: list[Mapping[str, Any]], nodes: list[int], known: Mapping[str, FailureClass], horizon_s: float
) -> Failures:
    names = list(dict.fromkeys(row["class"] for row in rows))
    t_s = np.array([row["t_s"] for row in rows], dtype=np.float64)
    order = np.argsort(t_s, kind="stable")
    order = order[t_s[order] < horizon_s]
    return Failures(
        tuple(known.get(name) or _unknown(name) for name in names),
        t_s[order],
        np.array(nodes, dtype=np.int64)[order],
        np.array([names.index(row["class"]) for row in rows], dtype=np.int64)[order],
        np.array([row["repair_s"] for row in rows], dtype=np.float64)[order],
    )


def _unknown(name: str) -> FailureClass:
    return FailureClass(name=name, per_1000_node_days=0.0, shows=_SHOWS.get(name, Shows.CRASH))
