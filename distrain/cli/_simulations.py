"""How ``distrain simulate`` shows what it found: tables for people, JSON for scripts, a bar for what takes long."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from distrain.faults.simulate import Cause, Curve, Estimate, Outcome, Scenario
from distrain.faults.simulate.sweep import estimate

_ROWS_OF_CURVE = 9  # shown; --json has all


@dataclass(frozen=True, slots=True)
class Report:
    """One scenario and what came of it."""

    scenario: Scenario
    outcomes: Sequence[Outcome]
    curve: Curve | None
    interval_s: float
    mtbf_s: float

    def print_json(self, written: Sequence[Path]) -> None:
        """All of it for a script; what is not known is null."""
        found: dict[str, Any] = {
            "scenario": asdict(self.scenario),
            "seeds": len(self.outcomes),
            "mtbf_s": self.mtbf_s,
            "interval_s": self.interval_s,
            "ettr": _fields(self._ettr()),
            "interruptions": self._mean(lambda each: each.interruptions),
            "saves": self._mean(lambda each: each.saves),
            "shares": {cause: _fields(self._share(cause)) for cause in Cause},
            "classes": {
                name: {"failures": num, "lost_work_s": lost_s, "down_s": down_s}
                for name, num, lost_s, down_s in self._classes()
            },
            "written": [str(path) for path in written],
        }
        if self.curve is not None:
            points = [{"interval_s": at_s, "ettr": _fields(ettr)} for at_s, ettr in self.curve.points]
            found |= {"best_interval_s": self.curve.best[0], "curve": points}
        print(json.dumps(found, indent=2, allow_nan=False))

    def show(self, written: Sequence[Path]) -> None:
        """Tables."""
        ettr = self._ettr()
        lines = [
            f"{self.scenario.job.gpus:,} GPUs, {self.scenario.job.days:g} days, "
            f"{len(self.outcomes)} run{'s' if len(self.outcomes) > 1 else ''}: "
            f"{self._mean(lambda each: each.interruptions):.1f} interruptions, "
            f"one failure in {self.mtbf_s / 3600:.3g} h, a save every {self.interval_s:.0f} s",
            f"effective training time ratio {_text(ettr)}",
        ]
        causes = Table("time", "% of all", "95 %", "hours", box=None, header_style="bold")
        for cause in Cause:
            share = self._share(cause)
            causes.add_row(
                cause.replace("_", " "),
                f"{100 * share.mean:.2f}",
                _bounds(share, 100),
                f"{share.mean * self.scenario.horizon_s / 3600:.1f}",
            )
        classes = Table("failure class", "failures", "lost work, h", "down, h", box=None, header_style="bold")
        for name, num, lost_s, down_s in self._classes():
            classes.add_row(name, f"{num:.1f}", f"{lost_s / 3600:.2f}", f"{down_s / 3600:.2f}")
        console = Console(soft_wrap=True)
        for part in (*lines, "", causes, "", classes, *self._curve_parts(), *map(str, written)):
            console.print(part, markup=False, highlight=False)

    def _curve_parts(self) -> Iterator[Table | str]:
        if self.curve is None:
            return
        best_s, best = self.curve.best
        points = self.curve.points
        top = next(index for index, (at_s, _) in enumerate(points) if at_s == best_s)
        step = -(-len(points) // _ROWS_OF_CURVE)
        table = Table("save every, s", "ETTR", "95 %", box=None, header_style="bold")
        for index, (at_s, ettr) in enumerate(points):
            if index % step == top % step:
                mark = " best" if index == top else ""
                table.add_row(f"{at_s:.0f}", f"{ettr.mean:.4f}", f"{_bounds(ettr, 1)}{mark}")
        yield from ("", table, f"best interval {best_s:.0f} s: {_text(best)}")

    def _ettr(self) -> Estimate:
        return self._share(Cause.TRAINING)

    def _share(self, cause: Cause) -> Estimate:
        return estimate([outcome.seconds[cause] / outcome.horizon_s for outcome in self.outcomes])

    def _mean(self, of: Callable[[Outcome], float]) -> float:
        return sum(map(of, self.outcomes)) / len(self.outcomes)

    def _classes(self) -> list[tuple[str, float, float, float]]:
        """Name, failures, lost work and other time lost a run, the costliest first."""
        names = {name for outcome in self.outcomes for name in outcome.failures}
        rows = []
        for name in names:
            num = sum(outcome.failures.get(name, 0) for outcome in self.outcomes) / len(self.outcomes)
            lost_s = self._mean(partial(_seconds, name=name, lost_work=True))
            down_s = self._mean(partial(_seconds, name=name, lost_work=False))
            rows.append((name, num, lost_s, down_s))
        return sorted(rows, key=lambda row: (-row[2] - row[3], row[0]))


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, which counts runs."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("simulate", total=total)
        yield lambda: bar.advance(task)


def _seconds(outcome: Outcome, *, name: str, lost_work: bool) -> float:
    counted = outcome.seconds_by_class.get(name, {})
    return sum(seconds for cause, seconds in counted.items() if (cause is Cause.LOST_WORK) == lost_work)


def _fields(value: Estimate) -> dict[str, float | None]:
    return {key: None if math.isnan(part) else part for key, part in asdict(value).items()}


def _text(value: Estimate) -> str:
    bounds = _bounds(value, 1)
    return f"{value.mean:.4f}" + (f", 95 % {bounds}" if bounds else "")


def _bounds(value: Estimate, scale: float) -> str:
    if math.isnan(value.low):
        return ""
    digits = 4 if scale == 1 else 2
    return f"[{scale * value.low:.{digits}f}, {scale * value.high:.{digits}f}]"
