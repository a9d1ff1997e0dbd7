"""What every benchmark shares: its command line, its table, its JSON file, and what is kept of an interrupted run.

A benchmark is a file of this folder with a function ``run(session)`` and ``main("its name", run)`` at the end. It
reports rows and metrics to the session; the session prints and writes them::

    python -m benchmarks.NAME [--quick] [--rounds N] [--resume DIR] [--json FILE] [--device cpu|cuda]

Numbers that could not be measured are NaN, never a guess.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
ROOT = Path(__file__).parent.parent
WIDTH = 140  # of tables in files


@dataclass(frozen=True, slots=True)
class Target:
    """What a metric is wanted to be; either bound may be missing."""

    at_least: float = -math.inf
    at_most: float = math.inf

    def verdict(self, value: float) -> str:
        """met, missed, not resolved (NaN), or nothing if nothing was wanted."""
        if math.isnan(value):
            return "not resolved"
        if self == Target():
            return ""
        return "met" if self.at_least <= value <= self.at_most else "missed"

    def __str__(self) -> str:
        bounds = (
            f">= {self.at_least:g}" if self.at_least > -math.inf else "",
            f"<= {self.at_most:g}" if self.at_most < math.inf else "",
        )
        return " and ".join(filter(None, bounds))


@dataclass(slots=True)
class Session:
    """One run of one benchmark."""

    name: str
    quick: bool
    rounds: int
    resume: Path | None
    console: Console
    device: str = "cpu"
    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """what of ours did not work at all: the run ends with exit code 1"""
    machine: dict[str, Any] = field(default_factory=lambda: machine())
    _targets: dict[str, tuple[Target, str]] = field(default_factory=dict)

    def row(self, **cells: Any) -> None:
        """Add a line to the table of results."""
        self.rows.append(cells)

    def metric(
        self,
        name: str,
        value: float,
        *,
        at_least: float = -math.inf,
        at_most: float = math.inf,
        note: str = "",
    ) -> None:
        """Report a number; NaN says that it is not known, and ``note`` why."""
        self.metrics[name] = value
        self._targets[name] = Target(at_least, at_most), note

    def say(self, text: str) -> None:
        """Tell the waiting user what is going on."""
        self.console.print(text, style="dim", highlight=False, markup=False)

    def part(self, name: str, measure: Callable[[], list[Row]]) -> list[Row]:
        """Rows of ``measure()``, or those that an earlier run of the same code has left in the ``--resume`` folder."""
        if self.resume is None:
            return measure()
        path = self.resume / f"{self.name}.{name}.json"
        key = {"commit": commit(), "quick": self.quick, "rounds": self.rounds}
        if path.exists() and (kept := json.loads(path.read_text()))["key"] == key:
            self.say(f"{name}: kept from {kept['date']}")
            return list(kept["rows"])
        rows = measure()
        _write(path, {"key": key, "date": _now(), "rows": rows})
        return rows

    def report(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "benchmark": self.name,
            "machine": self.machine,
            "date": _now(),
            "commit": commit(),
            "metrics": self.metrics,
            "rows": self.rows,
        }

    def show(self) -> None:
        """Print the rows, one table for each set of columns and without lists, and the metrics with their targets."""
        tables: dict[tuple[str, ...], Table] = {}
        for row in self.rows:
            shown = {name: _text(value) for name, value in row.items() if not isinstance(value, list)}
            table = tables.setdefault(
                tuple(shown), Table(*shown, box=None, header_style="bold", pad_edge=False)
            )
            table.add_row(*shown.values())
        if self.metrics:
            columns = ("metric", "value", "target", "verdict", "note")
            metrics = tables.setdefault(
                columns, Table(*columns, box=None, header_style="bold", pad_edge=False)
            )
            for name, value in self.metrics.items():
                target, note = self._targets[name]
                metrics.add_row(name, _text(value), str(target), target.verdict(value), note)
        for table in tables.values():
            self.console.print(table, "")


def main(
    name: str,
    run: Callable[[Session], None],
    arguments: list[str] | None = None,
    *,
    rounds: int = 7,
    devices: Sequence[str] = (),
) -> None:
    """Command line of one benchmark: ``rounds`` rounds, and the first of ``devices``, unless told otherwise."""
    options = _options(name, arguments, rounds, devices)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    session = Session(
        name, options.quick, options.rounds or (1 if options.quick else rounds), options.resume, console
    )
    session.device = getattr(options, "device", session.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that devices and processes are cleaned up
    start = time.monotonic()
    try:
        run(session)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    session.machine["seconds"] = round(time.monotonic() - start, 1)
    session.show()
    if options.json:
        _write(options.json, session.report())
    if session.failed:
        raise SystemExit("\n".join(f"error: {text}" for text in session.failed))


def _options(
    name: str, arguments: list[str] | None, rounds: int, devices: Sequence[str]
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a smoke test of a few seconds, ours only")
    parser.add_argument(
        "--rounds", type=int, help=f"interleaved rounds of all contenders ({rounds}; quick: 1)"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="keep finished parts here and take them from here"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, commit, metrics and rows")
    if devices:
        parser.add_argument("--device", choices=devices, default=devices[0], help="what the layers run on")
    return parser.parse_args(arguments)


def commit() -> str:
    """The commit that is checked out, with a hash of what was changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head, changes = git("rev-parse", "--short", "HEAD"), git("diff", "HEAD", "--", "*.py", "*.cpp")
    changed = f"+{hashlib.blake2b(changes.encode(), digest_size=4).hexdigest()}" if changes else ""
    return f"{head or 'unknown'}{changed}"


def machine() -> dict[str, Any]:
    """This machine in a few words."""
    models = [
        line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": package_version("torch"),
    }


def package_version(name: str) -> str:
    """Version of an installed package, or an empty string."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that an interrupted run leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(path)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
