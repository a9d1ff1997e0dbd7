"""A drill: run a job, break it as a plan says, launch it again until it is done, and score how it came through.

::

    sound/    the same job undisturbed, for comparison
    faulty/   the job under faults, launched again after each failure
    truth/    what the injector did, and when
    launch-N.json, launch-N.log    how each launch ended, and what it printed

Launching again stands for the recovery of a cluster: what a job gets back from memory or disk by itself is scored so.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distrain.core.errors import LaunchError
from distrain.core.events import read_events
from distrain.core.vocabulary import REPORT, IncidentClass

from .command import end_all, first_failure, lost_nodes, run_command
from .inject import FaultPlan, Injector, JobShape, read_truth
from .score import Attempt, Detection, Score, StepDone, score
from .watcher import Watcher

Command = Callable[[Path], Sequence[str]]
"""words that start the job in a run folder"""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drill:
    """What is run."""

    plan: FaultPlan
    job: JobShape
    command: Command
    folder: Path
    compare: Callable[[Path, Path], bool | None] = lambda sound, faulty: None
    """whether two run folders hold the same final state; None if that cannot be said"""
    max_launches: int = 4
    timeout_s: float = 900.0
    """of one launch: a job that hangs is killed then"""
    with_reference: bool = True
    in_run_folder: bool = False
    """whether the job's working folder is its run folder"""
    environ: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(dict(os.environ)))


def run(drill: Drill, *, say: Say = lambda text: None) -> Score:
    """Carry the drill out; the job ends with this process, whatever kills it.

    Raises:
        LaunchError: the job fails without any fault.
    """
    with Watcher() as watcher:
        return _run(replace(drill, environ={**drill.environ, **watcher.variables}), say)


def _run(drill: Drill, say: Say) -> Score:
    usual_s = _undisturbed(drill, say) if drill.with_reference else None
    attempts: list[Attempt] = []
    detections: list[Detection] = []
    with Injector(drill.plan, drill.folder / "truth") as injector:
        try:
            while len(attempts) < drill.max_launches and not (attempts and attempts[-1].code == 0):
                number = len(attempts) + 1
                say(f"launch {number} of the job under {len(drill.plan.faults)} faults")
                attempts.append(
                    _launch(drill, drill.folder / "faulty", f"launch-{number}", injector.variables)
                )
                detections += _launchers_verdict(drill.folder / f"launch-{number}.json", drill.job)
        finally:
            end_all(injector.pids("keeper"))
    is_equal = None
    if drill.with_reference and attempts[-1].code == 0:
        say("comparing the final states")
        is_equal = drill.compare(drill.folder / "sound", drill.folder / "faulty")
    found = score(
        drill.plan,
        drill.job,
        truth=read_truth(drill.folder / "truth"),
        attempts=attempts,
        detections=detections,
        is_equal=is_equal,
        usual_s=usual_s,
    )
    (drill.folder / "score.json").write_text(json.dumps(to_json(found), indent=1))
    return found


def _undisturbed(drill: Drill, say: Say) -> float | None:
    """Run the job without faults; what a step usually takes, if it says so. Raises LaunchError."""
    say("an undisturbed run, for comparison")
    reference = _launch(drill, drill.folder / "sound", "reference", {})
    if reference.code:
        raise LaunchError(
            "the job fails without any fault",
            got=f"exit code {reference.code}",
            hint=f"see {drill.folder}/reference.log",
        )
    return statistics.median(each.seconds for each in reference.steps) if reference.steps else None


def to_json(found: Score) -> dict[str, Any]:
    """Plain JSON."""
    return asdict(found)


def _launch(drill: Drill, run_folder: Path, name: str, variables: Mapping[str, str]) -> Attempt:
    """Start the job once and wait for its end."""
    began_ns = time.time_ns()
    code = run_command(
        drill.command(run_folder),
        environ={**drill.environ, **variables, REPORT: str(drill.folder / f"{name}.json")},
        log=drill.folder / f"{name}.log",
        timeout_s=drill.timeout_s,
        cwd=run_folder if drill.in_run_folder else None,
    )
    ended_ns = time.time_ns()
    steps = _steps(run_folder, since_ns=began_ns)
    return Attempt(began_ns=began_ns, ended_ns=ended_ns, code=code, steps=steps)


def _steps(run_folder: Path, *, since_ns: int) -> tuple[StepDone, ...]:
    """The steps of one launch: its event log has a scalar ``seconds`` for each.

    Their wall time is reckoned from the monotonic one, which no fault changes.
    """
    logs = [*run_folder.glob("events.jsonl"), *run_folder.glob("*/events.jsonl")]
    found, epoch_ns = [], time.time_ns() - time.monotonic_ns()
    for event in (event for log in logs for event in read_events(log)):
        wall_ns = epoch_ns + event.mono_ns
        if event.name == "seconds" and event.step is not None and wall_ns >= since_ns:
            found.append(StepDone(step=event.step, wall_ns=wall_ns, seconds=event.value or 0.0))
    return tuple(found)


def _launchers_verdict(report: Path, job: JobShape) -> list[Detection]:
    """What the launcher has noticed: which rank failed first, and which nodes are lost."""
    first = first_failure(report)
    found: list[tuple[tuple[int, ...], float]] = [((int(first["rank"]),), first["at"])] if first else []
    found += [(job.ranks_on(int(each["node"])), each["at"]) for each in lost_nodes(report)]
    return [
        Detection(incident=IncidentClass.CRASH, suspects=suspects, wall_ns=round(at * 1e9), source="launcher")
        for suspects, at in found
    ]
