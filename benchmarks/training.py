"""Training steps against PyTorch's and DeepSpeed's: the same model, weights, batches and optimizer on four ranks.

Every contender first trains a few steps and is held against one process that does it the plain way: only who ends with
the same losses and weights is compared. Then all take turns, a few steps each a round, every rank on a device of fixed
speed.

Time is that from the first rank's start to the last rank's end; metrics are tokens/s, ours over theirs.
"""

import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .crew import Crew, CrewError, crew
from .fixed_speed import fixed_speed
from .harness import Row, Session, main, package_version
from .intervals import paired_ratio

if TYPE_CHECKING:
    from .training_contenders.base import Arrays, Factory, Job

WORLD_SIZE = 4
CHECKED_STEPS = 3
TOLERANCE = 1e-5
"""largest |weight - reference| / |reference| of a parameter, in Frobenius norms, after the checked steps"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A metric: ours over theirs, with the least value wanted; ``overhead`` where the question is a few per cent."""

    metric: str
    ours: str
    theirs: str
    at_least: float = -math.inf
    overhead: float = math.inf


@dataclass(frozen=True, slots=True)
class Family:
    """Contenders that do the same job, and what is asked about them."""

    name: str
    job: "Job"
    contenders: "dict[str, Factory]"
    comparisons: Sequence[Comparison]
    steps_per_turn: int


def families(*, quick: bool = False) -> list[Family]:
    """What is compared with what; a small model is enough to see that everything runs."""
    from distrain.core.vocabulary import ModelShape

    from .training_contenders import deepspeed_engines, ours, plain_torch
    from .training_contenders.base import Job

    wide = ModelShape(d_model=256, num_layers=4, num_heads=8, num_kv_heads=4, d_ffn=768, vocab_size=264)
    deep = ModelShape(d_model=128, num_layers=16, num_heads=4, num_kv_heads=2, d_ffn=384, vocab_size=264)
    if quick:
        wide = deep = ModelShape(
            d_model=64, num_layers=8, num_heads=4, num_kv_heads=2, d_ffn=128, vocab_size=264
        )
    return [
        Family(
            "data",
            Job(shape=wide),
            {
                "distrain ddp": ours.ddp,
                "torch DDP": plain_torch.ddp,
                "distrain fsdp2": ours.fsdp,
                "torch FSDP2": plain_torch.fsdp2,
                "distrain zero1": ours.zero1,
                "torch ZeroRedundancyOptimizer": plain_torch.zero,
                "DeepSpeed ZeRO-1": deepspeed_engines.zero1,
                "DeepSpeed ZeRO-3": deepspeed_engines.zero3,
            },
            [
                Comparison("ddp_over_torch_ddp", "distrain ddp", "torch DDP", 0.97, overhead=0.03),
                Comparison("fsdp_over_torch_fsdp2", "distrain fsdp2", "torch FSDP2", 0.97, overhead=0.03),
                Comparison("zero1_over_deepspeed_zero1", "distrain zero1", "DeepSpeed ZeRO-1", 1.2),
                Comparison("zero1_over_torch_zero", "distrain zero1", "torch ZeroRedundancyOptimizer"),
                Comparison("fsdp_over_deepspeed_zero3", "distrain fsdp2", "DeepSpeed ZeRO-3"),
            ],
            steps_per_turn=5,
        ),
        Family(
            "pipeline",
            Job(shape=deep, micro_batches=8),
            {
                "distrain 1f1b": ours.pipeline_1f1b,
                "torch Schedule1F1B": plain_torch.pipeline_1f1b,
                "DeepSpeed PipelineModule": deepspeed_engines.pipeline,
                "distrain zbv": ours.pipeline_zbv,
                "torch ScheduleZBVZeroBubble": plain_torch.pipeline_zbv,
            },
            [
                Comparison("pp_over_torch_1f1b", "distrain 1f1b", "torch Schedule1F1B", 1.1),
                Comparison("pp_over_deepspeed", "distrain 1f1b", "DeepSpeed PipelineModule", 1.4),
                Comparison("pp_zbv_over_torch_zbv", "distrain zbv", "torch ScheduleZBVZeroBubble"),
            ],
            steps_per_turn=3,
        ),
    ]


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(family: Family, session: Session) -> list[Row]:
    """One row a contender: its times, or why there are none."""
    from .training_contenders.base import Reference, make_worker

    job, rows = family.job, [_row(name, family.job) for name in _taking_part(family, session)]
    with ExitStack() as stack:
        alone = stack.enter_context(crew("reference", make_worker, Reference, job, world_size=1))
        crews = [
            stack.enter_context(
                crew(
                    row["contender"],
                    make_worker,
                    family.contenders[row["contender"]],
                    job,
                    world_size=WORLD_SIZE,
                )
            )
            for row in rows
        ]
        session.say(f"{family.name}: starting {len(rows)} contenders (DeepSpeed's first time takes a minute)")
        alone.ready()
        ((_, _, _, losses),) = alone.call("train", CHECKED_STEPS)
        (weights,) = alone.call("weights")
        taking_part = [
            (started, row)
            for started, row in zip(crews, rows, strict=True)
            if _is_sound(started, row, np.array(losses), weights, session)
        ]
        devices = stack.enter_context(fixed_speed(WORLD_SIZE))
        session.machine["speed"] = f"{devices.quota:g} cores a rank, {devices.kind}"
        for started, _ in taking_part:
            started.join(devices)
        for number in range(session.rounds):
            session.say(f"{family.name}: round {number + 1} of {session.rounds}")
            # Forth and back, so that a machine that grows slower or faster favours nobody.
            for started, row in taking_part if number % 2 == 0 else reversed(taking_part):
                _turn(started, row, 1 if session.quick else family.steps_per_turn)
    for row in rows:
        _summarise(row, job)
    return rows


def _taking_part(family: Family, session: Session) -> list[str]:
    from .training_contenders import deepspeed_engines

    names = list(family.contenders)
    if session.quick:
        return [name for name in names if name.startswith("distrain")]
    if not deepspeed_engines.is_installed():
        return [name for name in names if not name.startswith("DeepSpeed")]
    return names


def _is_sound(started: Crew, row: Row, losses: np.ndarray, weights: "Arrays", session: Session) -> bool:
    """Whether the contender can train at all; whether it trains the same is noted in its row."""
    try:
        started.ready(timeout_s=900.0)
        row["difference"] = _difference(started, losses, weights)
    except CrewError as error:
        session.say(str(error))
        row["problem"] = str(error).splitlines()[0]
        return False
    if row["difference"] > TOLERANCE:
        row["problem"] = "weights or losses differ from the reference"
    return True


def _difference(started: Crew, losses: np.ndarray, weights: "Arrays") -> float:
    """How far the contender is from the reference after the same steps: the largest of losses and parameters."""
    answers = started.call("train", CHECKED_STEPS)
    found = np.sum([shares for *_, shares in answers], axis=0)
    differences = [float(np.max(np.abs(found - losses) / losses))]
    parts = started.call("weights")
    if set().union(*parts) != set(weights):
        return math.inf
    for part in parts:
        differences += [
            float(np.linalg.norm(array - weights[name]) / np.linalg.norm(weights[name]))
            for name, array in part.items()
        ]
    return max(differences)


def _turn(started: Crew, row: Row, num_steps: int) -> None:
    answers = started.call("train", num_steps)
    starts, ends, cpu_s, _ = zip(*answers, strict=True)
    row["times_ms"].append((max(ends) - min(starts)) / num_steps * 1e3)
    row["cpu_times_ms"].append(sum(cpu_s) / len(cpu_s) / num_steps * 1e3)


def _row(name: str, job: "Job") -> Row:
    return {
        "contender": name,
        "params": job.shape.num_params,
        "tokens_per_s": math.nan,
        "step_ms": math.nan,
        "cpu_ms": math.nan,
        "difference": math.nan,
        "problem": "",
        "times_ms": [],
        "cpu_times_ms": [],
    }


def _summarise(row: Row, job: "Job") -> None:
    if row["times_ms"]:
        row["step_ms"] = statistics.median(row["times_ms"])
        row["cpu_ms"] = statistics.median(row["cpu_times_ms"])
        row["tokens_per_s"] = job.tokens_per_step / row["step_ms"] * 1e3


# -- comparing -------------------------------------------------------------------------------------------------------


def compare(comparison: Comparison, rows: dict[str, Row]) -> tuple[float, str]:
    """The metric and a note; NaN where a contender is missing, wrong, or too close to call."""
    from .training_contenders.deepspeed_engines import HINT

    if comparison.theirs not in rows:
        return math.nan, f"{comparison.theirs} is not installed: {HINT}"
    pair = rows[comparison.ours], rows[comparison.theirs]
    for row in pair:
        if row["problem"]:
            return math.nan, f"{row['contender']}: {row['problem']}"
    interval = paired_ratio(pair[1]["times_ms"], pair[0]["times_ms"])
    value = interval.median
    if comparison.overhead < math.inf:
        value = interval.resolved(at_least=comparison.at_least, allowed=comparison.overhead)
    return value, str(interval)


def run(session: Session) -> None:
    """Measure both families and report."""
    session.machine["deepspeed"] = package_version("deepspeed")
    for family in families(quick=session.quick):
        rows = session.part(family.name, lambda family=family: measure(family, session))  # type: ignore[misc]
        for row in rows:
            session.row(**row)
        by_name = {row["contender"]: row for row in rows}
        for comparison in [] if session.quick else family.comparisons:
            value, note = compare(comparison, by_name)
            session.metric(comparison.metric, value, at_least=comparison.at_least, note=note)
    broken = [row for row in session.rows if row["problem"] and row["contender"].startswith("distrain")]
    session.failed = [f"{row['contender']}: {row['problem']}" for row in broken]


if __name__ == "__main__":
    main("training", run, rounds=20)
