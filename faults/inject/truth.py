"""What really happened to a job, written by whoever did it: the ground truth by which detectors are scored.

One JSON line a fault that fired, in a file for each process that injects, below one folder: processes of several
nodes never write to the same file. A fault that kills writes first. A job that is launched again finds here which
faults have had their turn, so that no fault happens twice.
"""

import json
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distrain.core.clock import Clock, MonotonicClock
from distrain.core.errors import DataError
from distrain.core.vocabulary import FaultKind

FIRED, LIFTED, FAILED = "fired", "lifted", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line."""

    fault: int
    """number in the plan"""
    kind: FaultKind
    event: str
    """fired, lifted (a fault that lasted is over) or failed (it could not be carried out: ``detail`` says why)"""
    victim: int
    """a rank, or a node where no rank is hit"""
    pid: int
    """the process that was hit"""
    wall_ns: int
    """nanoseconds since 1970"""
    mono_ns: int
    """monotonic nanoseconds of ``host``"""
    host: str
    step: int | None = None
    """the training step in which the victim was, if it said so"""
    detail: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class TruthLog:
    """Appends to the file of one process, which only its owner can read.

    Wall time is what it was when the log was opened and has passed since: later the clock may be made wrong.
    """

    def __init__(self, folder: Path, *, who: str, clock: Clock | None = None) -> None:
        """``who`` names the file: no two processes that run at a time may share it. Raises OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{who}.jsonl"
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._clock = clock or MonotonicClock()
        self._epoch_ns = round(self._clock.wall_s() * 1e9) - self._clock.monotonic_ns()
        self._host = socket.gethostname()

    def write(
        self,
        event: str,
        *,
        fault: int,
        kind: FaultKind,
        victim: int,
        pid: int,
        step: int | None = None,
        detail: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Append one line, in one write, so that it is whole or not there whatever dies next; raises OSError."""
        mono_ns = self._clock.monotonic_ns()
        line = {
            "fault": fault,
            "kind": kind,
            "event": event,
            "victim": victim,
            "pid": pid,
            "wall_ns": self._epoch_ns + mono_ns,
            "mono_ns": mono_ns,
            "host": self._host,
            "step": step,
            "detail": dict(detail),
        }
        os.write(self._fd, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read_truth(folder: str | Path) -> list[Record]:
    """All lines of all files in the order of their wall time; none if the folder is not there.

    Raises:
        DataError: a line is not one of these.
    """
    found = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                table = json.loads(line)
                found.append(Record(**{**table, "kind": FaultKind(table["kind"])}))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError("this is no record of a fault", got=f"{path}:{number}: {error}") from None
    return sorted(found, key=lambda record: record.wall_ns)


def had_their_turn(records: Iterable[Record]) -> set[tuple[int, int]]:
    """Fault and victim of what has fired and not failed in doing so."""
    by_event: dict[str, set[tuple[int, int]]] = {FIRED: set(), LIFTED: set(), FAILED: set()}
    for record in records:
        by_event[record.event].add((record.fault, record.victim))
    return by_event[FIRED] - by_event[FAILED]
