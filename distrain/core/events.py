"""What happened in a run, as one line of JSON each: scalars, events, and spans with a duration.

``EventLog`` is what code writes to; where it goes is a ``Sink``. ``JsonlSink`` is always on, so that every run can be
looked at afterwards; Perfetto, TensorBoard and the like are further sinks. Two promises:

- Recording never stops training. A sink that raises is reported once, its losses are counted, and it is tried again
  with the next event, because a full disk may be emptied.
- A kill loses at most the line that was being written. Each line is one ``write`` to a file opened for appending;
  whoever opens the file next ends a torn line before writing its own.

The file: each opening writes a line ``{"distrain_events": VERSION, ...}`` (so the first line is one), then one event
a line. Values that JSON lacks (nan, inf) stand as the strings that ``float`` reads.
"""

import json
import logging
import math
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from .clock import Clock, MonotonicClock
from .errors import DataError

VERSION = 1
_HEADER = "distrain_events"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened; ``kind`` is scalar, event or span."""

    kind: str
    name: str
    rank: int
    host: str
    wall_s: float
    """seconds since 1970; for a span, of its start"""
    mono_ns: int
    """monotonic nanoseconds of this host; for a span, of its start"""
    step: int | None = None
    value: float | None = None
    """scalars only"""
    duration_s: float | None = None
    """spans only"""
    attributes: Mapping[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """Somewhere events go. It may raise: the log counts what it loses."""

    def write(self, event: Event) -> None:
        """Take one event; may be called from any thread."""

    def close(self) -> None:
        """Release what is held; called once."""


class EventLog:
    """Gives events their time, rank and host, and hands them to every sink."""

    def __init__(
        self, sinks: Sequence[Sink], *, rank: int = 0, host: str = "", clock: Clock | None = None
    ) -> None:
        self.num_dropped = 0
        """events that some sink did not take, counted for each sink"""
        self._sinks = tuple(sinks)
        self._failed: set[int] = set()
        self._rank, self._host = rank, host or socket.gethostname()
        self._clock = clock or MonotonicClock()

    def scalar(self, name: str, value: float, *, step: int | None = None, **attributes: Any) -> None:
        """A number that is plotted over steps."""
        self._write(kind="scalar", name=name, value=float(value), step=step, attributes=attributes)

    def event(self, name: str, *, step: int | None = None, **attributes: Any) -> None:
        """Something that happened at one moment."""
        self._write(kind="event", name=name, step=step, attributes=attributes)

    @contextmanager
    def span(self, name: str, *, step: int | None = None, **attributes: Any) -> Iterator[dict[str, Any]]:
        """Something that takes time; yields its attributes, to which the body may add.

        Written when it ends; an exception that ends it is noted as the attribute ``error`` and goes on.
        """
        wall_s, start_ns = self._clock.wall_s(), self._clock.monotonic_ns()
        try:
            yield attributes
        except BaseException as error:
            attributes["error"] = type(error).__name__
            raise
        finally:
            self._write(
                kind="span",
                name=name,
                step=step,
                attributes=attributes,
                wall_s=wall_s,
                mono_ns=start_ns,
                duration_s=(self._clock.monotonic_ns() - start_ns) / 1e9,
            )

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, **values: Any) -> None:
        now = {"wall_s": self._clock.wall_s(), "mono_ns": self._clock.monotonic_ns()}
        event = Event(rank=self._rank, host=self._host, **(now | values))
        for number, sink in enumerate(self._sinks):
            try:
                sink.write(event)
            except Exception as error:
                self.num_dropped += 1
                if number not in self._failed:  # a logger, since a warning can be turned into an exception
                    self._failed.add(number)
                    logging.getLogger(__name__).warning("%s drops events: %s", type(sink).__name__, error)


class JsonlSink:
    """Appends events to a file that only its owner can read."""

    def __init__(self, path: str | Path) -> None:
        """Open ``path``, creating it and its folders where needed; raises OSError."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        self._append({_HEADER: VERSION, "pid": os.getpid(), "host": socket.gethostname()})

    def write(self, event: Event) -> None:
        """Append one line; raises OSError."""
        record = {name: getattr(event, name) for name in Event.__slots__}
        self._append({name: value for name, value in record.items() if value is not None and value != {}})

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(_plain(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            data = b"\n" + line if self._torn else line
            self._torn = True  # until the whole line is down: a full disk takes the first half
            written = os.write(self._fd, data)
            self._torn = written < len(data)
        if self._torn:
            raise OSError(f"{self.path}: only {written} of {len(data)} bytes were written")


@dataclass(frozen=True, slots=True)
class Recorded:
    """The events of a file in the order written, and the lines that a kill or a full disk left unreadable."""

    events: tuple[Event, ...]
    num_damaged: int

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)


def read_events(path: str | Path) -> Recorded:
    """Read a file that ``JsonlSink`` wrote, also one that is being written or whose writer was killed.

    Raises:
        DataError: the file cannot be read, holds no events, or was written by a later version.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise DataError("the events file cannot be read", got=f"{path}: {error.strerror}") from error
    events: list[Event] = []
    versions: list[Any] = []
    num_damaged = 0
    for line in filter(None, lines):
        try:
            record = json.loads(line)
            if _HEADER in record:
                versions.append(record[_HEADER])
            else:
                events.append(_event(record))
        except (ValueError, TypeError):
            num_damaged += 1
    if not versions:
        raise DataError("this is not an events file", got=str(path), allowed=f"a first line with {_HEADER!r}")
    if foreign := [version for version in versions if version != VERSION]:
        raise DataError("the events file has another version", got=f"{path}: {foreign}", allowed=str(VERSION))
    return Recorded(tuple(events), num_damaged)


def _event(record: Any) -> Event:
    """The event of one line; raises TypeError or ValueError for anything else."""
    event = Event(**record)
    return event if event.value is None else replace(event, value=float(event.value))


def _plain(value: Any) -> Any:
    """``value`` in what JSON has; what it has not becomes a string."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)
