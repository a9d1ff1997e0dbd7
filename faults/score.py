"""How well a job came through its faults: what was done to it against what it noticed, lost and got back. Pure.

Truth comes from the injector (``inject.truth``), what the job noticed from its launcher and, once there are any, its
detectors; both as plain records with wall-clock nanoseconds. A fault is *detected* by the first detection after it
that blames its victim or, failing that, by the first one before the next fault; a wrong suspect counts as such.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from distrain.core.vocabulary import FaultKind, IncidentClass

from .inject.checks import JobShape, ranks_hit, victims
from .inject.kinds import KINDS, Victim
from .inject.plan import FaultPlan
from .inject.truth import FIRED, Record

FATAL = frozenset(
    {
        FaultKind.PROC_KILL,
        FaultKind.PROC_EXIT,
        FaultKind.PROC_EXCEPTION,
        FaultKind.PROC_OOM,
        FaultKind.NODE_LOSS,
        FaultKind.STORE_KILL,
    }
)
"""kinds after which training cannot go on by itself"""


Key = tuple[int, int]
"""number of a fault, and its victim"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """Somebody says that something is wrong."""

    incident: IncidentClass
    suspects: tuple[int, ...]
    """global ranks"""
    wall_ns: int
    source: str
    """who says so"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """The end of one training step, as the job reports it."""

    step: int
    wall_ns: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One launch of the job."""

    began_ns: int
    ended_ns: int
    code: int
    steps: tuple[StepDone, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultScore:
    """One fault on one victim."""

    fault: int
    kind: FaultKind
    victim: int
    fired_ns: int | None
    step: int | None
    detected: IncidentClass | None = None
    suspects: tuple[int, ...] = ()
    source: str = ""
    detect_s: float | None = None
    recover_s: float | None = None
    """from the fault until training is further than it was"""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A whole drill."""

    faults: tuple[FaultScore, ...]
    num_launches: int
    steps_lost: int
    """steps that were trained and had to be trained again"""
    goodput: float
    """seconds of steps that counted, none for more than it usually takes, over all seconds from the beginning of the
    first step to the end of the last"""
    startup_s: float
    """seconds until the first step began, which a job without faults needs too; no part of ``goodput``"""
    restarts_s: float
    """seconds of later launches until their first steps began; these cost goodput"""
    is_equal: bool | None
    """whether the final state is that of an undisturbed run, bit for bit; None if that was not compared"""
    problems: tuple[str, ...]
    """why the drill failed; none if it passed"""


def score(
    plan: FaultPlan,
    job: JobShape,
    *,
    truth: Sequence[Record],
    attempts: Sequence[Attempt],
    detections: Sequence[Detection],
    is_equal: bool | None,
    usual_s: float | None = None,
) -> Score:
    """Compare what happened with what the plan asks for; ``usual_s`` is what a step takes without faults."""
    fired = {(record.fault, record.victim): record for record in truth if record.event == FIRED}
    failed = {(r.fault, r.victim): str(r.detail.get("reason", "")) for r in truth if r.event == "failed"}
    hits = {
        (record.fault, record.victim): _ranks(plan, record.fault, record.victim, job)
        for record in fired.values()
    }
    faults = []
    for number, fault in enumerate(plan.faults):
        for victim in victims(fault, job):
            if plan.is_drawn(number, victim):
                key = number, victim
                row = _row(plan, number, victim, fired, hits, attempts, detections)
                if key in failed:
                    text = f"it could not be carried out: {failed[key]}"
                    row = replace(row, problems=(*row.problems, text))
                faults.append(row)
    problems = [
        f"fault {row.fault} ({row.kind}) on {row.victim}: {text}" for row in faults for text in row.problems
    ]
    if not attempts or attempts[-1].code:
        code = attempts[-1].code if attempts else "none"
        problems.append(f"the job did not come to its end: exit code {code} after {len(attempts)} launches")
    return Score(
        faults=tuple(faults),
        num_launches=len(attempts),
        steps_lost=steps_lost(attempts),
        goodput=goodput(attempts, usual_s=usual_s),
        startup_s=_start_s(attempts[0]) if attempts else 0.0,
        restarts_s=sum(map(_start_s, attempts[1:])),
        is_equal=is_equal,
        problems=tuple(problems),
    )


def steps_lost(attempts: Sequence[Attempt]) -> int:
    """Steps that were done more than once."""
    done = [each.step for attempt in attempts for each in attempt.steps]
    return len(done) - len(set(done))


def goodput(attempts: Sequence[Attempt], *, usual_s: float | None = None) -> float:
    """Seconds of the last time of each step over those of training, with all that lies between.

    A step that a fault has made slow counts for ``usual_s``; without an undisturbed run, for the median of all.

    Training begins with the first step, for a job that lasts for weeks starts but once; what faults make it start
    again counts. It ends with the last step or, if the job did not come to its end, with the last launch.
    """
    steps = [each for attempt in attempts for each in attempt.steps]
    if not steps:
        return 0.0
    most_s = statistics.median(each.seconds for each in steps) if usual_s is None else usual_s
    last = {each.step: min(each.seconds, most_s) for each in steps}
    ended_ns = attempts[-1].ended_ns if attempts[-1].code else max(each.wall_ns for each in steps)
    whole_s = (ended_ns - min(map(_begun_ns, steps))) / 1e9
    return sum(last.values()) / whole_s if whole_s > 0 else 0.0


def _begun_ns(step: StepDone) -> int:
    return step.wall_ns - round(step.seconds * 1e9)


def _start_s(attempt: Attempt) -> float:
    """Seconds of a launch before it trained; all of it if it never did."""
    begun_ns = min(map(_begun_ns, attempt.steps), default=attempt.ended_ns)
    return (begun_ns - attempt.began_ns) / 1e9


def _row(
    plan: FaultPlan,
    number: int,
    victim: int,
    fired: Mapping[Key, Record],
    hits: Mapping[Key, Sequence[int]],
    attempts: Sequence[Attempt],
    detections: Sequence[Detection],
) -> FaultScore:
    fault, record = plan.faults[number], fired.get((number, victim))
    if record is None:
        return FaultScore(
            fault=number,
            kind=fault.kind,
            victim=victim,
            fired_ns=None,
            step=None,
            problems=("it did not fire",),
        )
    found = _detection(record, fired, hits, detections)
    detect_s = (found.wall_ns - record.wall_ns) / 1e9 if found else None
    expect, problems = fault.expect, []
    if expect.incident is not None:
        if found is None:
            problems.append(f"nobody noticed; expected {expect.incident}")
        elif found.incident is not expect.incident:
            problems.append(f"taken for {found.incident}; expected {expect.incident}")
    if found and expect.suspects and not set(expect.suspects) & set(found.suspects):
        problems.append(f"{list(found.suspects)} were blamed; expected {list(expect.suspects)}")
    if expect.within_s is not None and (detect_s is None or detect_s > expect.within_s):
        took = "never" if detect_s is None else f"after {detect_s:.1f} s"
        problems.append(f"noticed {took}; expected within {expect.within_s:g} s")
    return FaultScore(
        fault=number,
        kind=fault.kind,
        victim=victim,
        fired_ns=record.wall_ns,
        step=record.step,
        detected=found.incident if found else None,
        suspects=found.suspects if found else (),
        source=found.source if found else "",
        detect_s=detect_s,
        recover_s=_recovery(record, attempts) if fault.kind in FATAL or found else None,
        problems=tuple(problems),
    )


def _ranks(plan: FaultPlan, number: int, victim: int, job: JobShape) -> tuple[int, ...]:
    """Whom a detector may blame for a fault on ``victim``."""
    fault = plan.faults[number]
    return (victim,) if KINDS[fault.kind].victim is Victim.RANK else ranks_hit(fault, job)


def _detection(
    record: Record,
    fired: Mapping[Key, Record],
    hits: Mapping[Key, Sequence[int]],
    detections: Sequence[Detection],
) -> Detection | None:
    """Who noticed this fault first; whoever blames a rank means the last fault that has hit it."""
    later = sorted((d for d in detections if d.wall_ns >= record.wall_ns), key=lambda d: d.wall_ns)
    next_ns = min((r.wall_ns for r in fired.values() if r.wall_ns > record.wall_ns), default=math.inf)

    def is_meant(seen: Detection) -> bool:
        able = [
            (r.wall_ns, key)
            for key, r in fired.items()
            if r.wall_ns <= seen.wall_ns and set(hits[key]) & set(seen.suspects)
        ]
        return bool(able) and max(able)[0] == record.wall_ns

    own = set(hits[record.fault, record.victim])
    blamed = (d for d in later if own & set(d.suspects) and is_meant(d))
    return next(blamed, next((d for d in later if d.wall_ns < next_ns), None))


def _recovery(record: Record, attempts: Sequence[Attempt]) -> float | None:
    """Seconds from the fault until a step is done that had not been done before it."""
    # After a fatal fault only a later launch can go on; its own may still report the step before.
    is_fatal = record.kind in FATAL
    before: list[StepDone] = []
    after: list[StepDone] = []
    for attempt in attempts:
        for each in attempt.steps:
            is_later = (attempt.began_ns if is_fatal else each.wall_ns) > record.wall_ns
            (after if is_later else before).append(each)
    reached = max((each.step for each in before), default=0)
    ahead = [each.wall_ns for each in after if each.step > reached]
    return (min(ahead) - record.wall_ns) / 1e9 if ahead else None
