"""Pictures of a simulation: what the time went to, when it went there, and ETTR over the checkpoint interval.

matplotlib is optional (``pip install 'distrain[plot]'``) and used without its global state: no pyplot, no backend that
a notebook would notice.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from distrain.planners.drawing import require

from .failures import DAY_S
from .job import Cause, Outcome
from .sweep import Curve

_COLOURS = {
    Cause.TRAINING: "#4c9f70",
    Cause.STALL: "#8da0cb",
    Cause.LOST_WORK: "#c0392b",
    Cause.DETECT: "#e67e22",
    Cause.DIAGNOSE: "#f1c40f",
    Cause.WAIT: "#7f8c8d",
    Cause.RESTART: "#8e44ad",
    Cause.RESTORE: "#2980b9",
}

_NAMED = 9  # failure classes with a colour of their own


def plot(folder: Path, outcomes: Sequence[Outcome], curve: Curve | None = None) -> list[Path]:
    """Write lost_time.svg and timeline.svg (of the first outcome), and interval.svg if there is a curve.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require()
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        _draw(folder / "lost_time.svg", (8, 4), lambda axes: _lost_time(axes, outcomes)),
        _draw(folder / "timeline.svg", (11, 2.8), lambda axes: _timeline(axes, outcomes[0])),
    ]
    if curve is not None:
        written.append(_draw(folder / "interval.svg", (7, 4), lambda axes: _interval(axes, curve)))
    return written


def _draw(path: Path, size: tuple[float, float], paint: Callable[[Any], None]) -> Path:
    figure = import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    paint(figure.add_subplot())
    figure.savefig(path, metadata={"Date": None})
    return path


def _lost_time(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """Bars by cause, in percent of the time, the mean over outcomes; the costliest classes have parts of their own."""
    total_s = sum(outcome.horizon_s for outcome in outcomes)
    causes = [cause for cause in Cause if cause is not Cause.TRAINING]
    left = [0.0] * len(causes)
    names = sorted({name for outcome in outcomes for name in outcome.seconds_by_class})
    shares = {name: [_share(outcomes, name, cause, total_s) for cause in causes] for name in names}
    whole = [100 * sum(outcome.seconds[cause] for outcome in outcomes) / total_s for cause in causes]
    labels = [cause.replace("_", " ") for cause in causes]
    for name in sorted(names, key=lambda name: -sum(shares[name]))[:_NAMED]:
        axes.barh(labels, shares[name], left=left, edgecolor="white", linewidth=0.4, label=name)
        left = [a + b for a, b in zip(left, shares[name], strict=True)]
    rest = [max(0.0, a - b) for a, b in zip(whole, left, strict=True)]
    axes.barh(labels, rest, left=left, color="#bbbbbb", label="saving, and all others")
    axes.margins(x=0.05)
    axes.invert_yaxis()
    axes.set_xlabel("% of the time")
    axes.legend(fontsize=7)


def _share(outcomes: Sequence[Outcome], name: str, cause: Cause, total_s: float) -> float:
    return 100 * sum(each.seconds_by_class.get(name, {}).get(cause, 0.0) for each in outcomes) / total_s


def _timeline(axes: Any, outcome: Outcome) -> None:
    """A line a day, from left to right, coloured by what the job did."""
    num_days = int(-(-outcome.horizon_s // DAY_S))
    for cause, colour in _COLOURS.items():
        pieces: list[list[tuple[float, float]]] = [[] for _ in range(num_days)]
        for span in outcome.spans:
            if span.cause is cause:
                for day in range(int(span.start_s // DAY_S), int(-(-span.end_s // DAY_S))):
                    begin = max(span.start_s, day * DAY_S)
                    end = min(span.end_s, (day + 1) * DAY_S)
                    pieces[day].append(((begin - day * DAY_S) / 3600, (end - begin) / 3600))
        if not any(pieces):
            continue
        for day, day_pieces in enumerate(pieces):
            axes.broken_barh(day_pieces, (day + 0.05, 0.9), facecolors=colour, linewidth=0)
        axes.broken_barh([], (0, 0), facecolors=colour, label=cause.replace("_", " "))
    axes.set(xlim=(0, 24), ylim=(num_days, 0), xlabel="hour", ylabel="day")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def _interval(axes: Any, curve: Curve) -> None:
    """ETTR with its interval of confidence; the best point is marked."""
    intervals = [interval_s for interval_s, _ in curve.points]
    axes.fill_between(
        intervals,
        [point.low for _, point in curve.points],
        [point.high for _, point in curve.points],
        alpha=0.2,
    )
    axes.plot(intervals, [point.mean for _, point in curve.points], marker=".")
    best_s, best = curve.best
    axes.plot([best_s], [best.mean], "o", color="#c0392b", label=f"{best_s:.0f} s: {best.mean:.4f}")
    axes.set(xscale="log", xlabel="training between two saves, s", ylabel="effective training time ratio")
    axes.legend()
