"""Groups of the right size for every sequence against one degree for all, in real training on ranks of fixed speed.

A step has long-tailed sequences, of which the longest needs the memory of several devices. With one degree for all,
the short ones pay for all-to-alls that they do not need; the planner gives each group the degree it needs::

    one degree   [ 0 1 2 3 4 5 6 7 ]  [ 0 1 2 3 4 5 6 7 ]       [ 0 1 2 3 4 5 6 7 ]  ...
    adaptive     [ 0 1 2 3 4 5 6 7 ]  [ 0 1 ][ 2 3 ][4][5][6][7]  [0][1][2][3][4][5][6][7]

In one run: the cost model is fitted to timed groups of this machine; the planner plans with it; the plans are trained
in turn, one of each degree that fits among them, packed by the same planner; and each micro-batch is held against what
the model said. All train the same model on the same sequences, and must end with the weights of one process that takes
the sequences one by one in plain PyTorch. DeepSpeed-Ulysses' ``DistributedAttention`` trains the plan of the best
degree, with our attention inside.

The memory of a device, in tokens, is a setting: that the longest sequence needs all devices, or half of them.
"""

import math
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from distrain.planners.sequence.cost import SequenceCost
from distrain.planners.sequence.fit import Sample, fit
from distrain.planners.sequence.step_plan import StepPlan

from .crew import Crew, CrewError, crew
from .fixed_speed import fixed_speed
from .harness import Row, Session, main, package_version
from .intervals import paired_ratio
from .sequence_plans import (
    adaptive_plan,
    degrees_of,
    degrees_shown,
    long_tailed,
    samples,
    shown,
    static_plans,
    uniform,
)

if TYPE_CHECKING:
    from .sequence_contenders import Job

TOLERANCE = 1e-5
"""largest |weight - reference| / |reference| of a parameter, in Frobenius norms, after the checked steps"""
CHECKED_STEPS = 2
ADAPTIVE, PEER = "adaptive", "DeepSpeed-Ulysses"


@dataclass(frozen=True, slots=True)
class Setting:
    """What is trained, on how many devices, with memory for how many tokens each."""

    name: str
    job: "Job"
    world_size: int
    tokens_per_gpu: int
    repeats: int = 3
    """timings of each group for the fit"""


def settings(*, quick: bool = False) -> list[Setting]:
    """The longest sequence needs all devices, or half of them."""
    from distrain.core.vocabulary import ModelShape

    from .sequence_contenders import Job

    if quick:
        shape = ModelShape(d_model=32, num_layers=1, num_heads=4, num_kv_heads=4, d_ffn=64, vocab_size=264)
        return [Setting("all", Job(shape=shape, lengths=tuple(long_tailed(24, longest=300))), 4, 80, 1)]
    shape = ModelShape(d_model=128, num_layers=4, num_heads=8, num_kv_heads=8, d_ffn=256, vocab_size=264)
    job = Job(shape=shape, lengths=tuple(long_tailed(320, longest=2800)))
    return [Setting("all", job, 8, 500), Setting("half", job, 8, 800)]


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(setting: Setting, session: Session) -> list[Row]:
    """Rows of three kinds: groups that were timed for the fit, contenders, and micro-batches as predicted and met."""
    from .sequence_contenders import Reference, Worker, with_deepspeed
    from .training_contenders import deepspeed_engines

    job, world_size = setting.job, setting.world_size
    with ExitStack() as stack:
        alone = stack.enter_context(crew("reference", Reference, job, world_size=1))
        crews = [stack.enter_context(crew("distrain", Worker, job, world_size=world_size))]
        if deepspeed_engines.is_installed() and not session.quick:
            crews.append(stack.enter_context(crew(PEER, with_deepspeed, job, world_size=world_size)))
        for started in (alone, *crews):
            started.ready(timeout_s=900.0)
        ((losses, weights),) = alone.call("checked", CHECKED_STEPS)
        devices = stack.enter_context(fixed_speed(world_size))
        session.machine["speed"] = f"{devices.quota:g} cores a rank, {devices.kind}"
        for started in crews:
            started.join(devices)
        fits, cost = fitted(crews[0], setting, session)
        contenders = _contenders(crews, setting, cost)
        for each in contenders:
            session.say(f"{each.row['contender']}: {each.row['micro_batches']}")
            each.check(losses, weights)
        for number in range(session.rounds):
            session.say(f"{setting.name}: round {number + 1} of {session.rounds}")
            # Forth and back, so that a machine that grows slower or faster favours nobody.
            for each in contenders if number % 2 == 0 else reversed(contenders):
                each.turn()
        rows = [row for each in contenders for row in (each.summary(), *each.predictions())]
        return [{"setting": setting.name, **row} for row in (*fits, *rows)]


def fitted(ours: Crew, setting: Setting, session: Session) -> tuple[list[Row], SequenceCost]:
    """The cost model of this machine, and the groups it was fitted to."""
    timed = []
    for degree in degrees_of(setting.world_size):
        session.say(f"{setting.name}: timing groups of {degree}")
        for lengths in samples(degree, tokens_per_gpu=setting.tokens_per_gpu):
            plan = uniform(lengths, degree, num_slots=setting.world_size)
            everyone = lengths * (setting.world_size // degree)
            times = [micro_batch_ms(ours, plan, everyone)[0] for _ in range(setting.repeats)]
            timed.append(Sample(tuple(lengths), degree, statistics.median(times)))
    shape = setting.job.shape
    result = fit(timed, layers=shape.num_layers, hidden=shape.d_model, tokens_per_gpu=setting.tokens_per_gpu)
    rows: list[Row] = [
        {
            "degree": sample.degree,
            "sequences": len(sample.lengths),
            "tokens": sum(sample.lengths),
            "measured_ms": sample.ms,
            "fit_error": error,
        }
        for sample, error in zip(timed, result.errors, strict=True)
    ]
    return rows, result.cost


def micro_batch_ms(ranks: Crew, plan: StepPlan, lengths: Sequence[int]) -> list[float]:
    """How long each micro-batch takes, from the first rank's start to the last one's end."""
    by_rank = ranks.call("timed", plan, lengths)
    return [
        (max(end for _, end in spans) - min(start for start, _ in spans)) * 1e3
        for spans in zip(*by_rank, strict=True)
    ]


class Contender:
    """A plan, who trains by it, and what was measured."""

    def __init__(self, name: str, ranks: Crew, plan: StepPlan, job: "Job") -> None:
        self._ranks, self._plan, self._job = ranks, plan, job
        self._micro_batch_ms: list[list[float]] = []
        self.row: Row = {
            "contender": name,
            "micro_batches": shown(plan),
            "planned_ms": plan.estimated_ms,
            "step_ms": math.nan,
            "cpu_ms": math.nan,
            "tokens_per_s": math.nan,
            "difference": math.nan,
            "problem": "",
            "times_ms": [],
            "cpu_times_ms": [],
        }

    def check(self, losses: Sequence[float], weights: dict[str, np.ndarray]) -> None:
        """Whether it can train, and trains the same as the reference."""
        try:
            answers = self._ranks.call("checked", self._plan, CHECKED_STEPS)
        except CrewError as error:
            self.row["problem"] = str(error).splitlines()[0]
            return
        shares, found = np.sum([shares for shares, _ in answers], axis=0), answers[0][1]
        differences = [float(np.max(np.abs(shares - losses) / losses))]
        differences += [
            float(np.linalg.norm(found[name] - array) / np.linalg.norm(array))
            for name, array in weights.items()
        ]
        self.row["difference"] = max(differences)
        if self.row["difference"] > TOLERANCE:
            self.row["problem"] = "weights or losses differ from the reference"

    def turn(self) -> None:
        """One round: a training step, and each micro-batch by itself."""
        if self.row["problem"]:
            return
        starts, ends, cpu_s = zip(*self._ranks.call("train", self._plan, 1), strict=True)
        self.row["times_ms"].append((max(ends) - min(starts)) * 1e3)
        self.row["cpu_times_ms"].append(sum(cpu_s) / len(cpu_s) * 1e3)
        if not self.row["contender"].startswith(PEER):  # the model was not fitted to it
            self._micro_batch_ms.append(micro_batch_ms(self._ranks, self._plan, self._job.lengths))

    def summary(self) -> Row:
        """The row with its medians."""
        if self.row["times_ms"]:
            self.row["step_ms"] = statistics.median(self.row["times_ms"])
            self.row["cpu_ms"] = statistics.median(self.row["cpu_times_ms"])
            self.row["tokens_per_s"] = sum(self._job.lengths) / self.row["step_ms"] * 1e3
        return self.row

    def predictions(self) -> list[Row]:
        """A row for each micro-batch."""
        rows = []
        measured = [statistics.median(times) for times in zip(*self._micro_batch_ms, strict=True)]
        for index, (groups, met_ms) in enumerate(zip(self._plan.microbatches, measured, strict=False)):
            predicted_ms = max(group.estimated_ms for group in groups)
            rows.append(
                {
                    "plan": self.row["contender"],
                    "micro_batch": index,
                    "groups": degrees_shown(groups),
                    "predicted_ms": predicted_ms,
                    "met_ms": met_ms,
                    "error": predicted_ms / met_ms - 1,
                }
            )
        return rows


def _contenders(crews: Sequence[Crew], setting: Setting, cost: SequenceCost) -> list[Contender]:
    """The adaptive plan, one of each degree that fits, and a peer with the best of these by its estimate."""
    job, num_slots = setting.job, setting.world_size
    static = static_plans(job.lengths, num_slots=num_slots, cost=cost)
    ours, *peers = crews
    found = [Contender(ADAPTIVE, ours, adaptive_plan(job.lengths, num_slots=num_slots, cost=cost), job)]
    found += [Contender(f"degree {degree}", ours, plan, job) for degree, plan in static.items()]
    best = min(static, key=lambda degree: static[degree].estimated_ms)
    return [*found, *(Contender(f"{PEER}, degree {best}", peer, static[best], job) for peer in peers)]


# -- reporting -------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], session: Session, *, suffix: str = "") -> None:
    """Metrics of one setting; those with a target have no suffix."""
    contenders = {row["contender"]: row for row in rows if "contender" in row}
    failed = {name: row["problem"] for name, row in contenders.items() if row["problem"]}
    session.failed += [f"{name}: {text}" for name, text in failed.items() if not name.startswith(PEER)]
    if session.quick or session.failed:
        return
    ours = [row for name, row in contenders.items() if name.startswith("degree")]
    best = min(ours, key=lambda row: float(row["step_ms"]))
    gain = paired_ratio(best["times_ms"], contenders[ADAPTIVE]["times_ms"])
    errors = [abs(row["error"]) for row in rows if "error" in row]
    session.metric(
        f"adaptive_over_best_static{suffix}",
        gain.median,
        at_least=-math.inf if suffix else 1.3,
        note=f"{best['contender']}, {gain}",
    )
    session.metric(
        f"prediction_error{suffix}",
        statistics.fmean(errors),
        at_most=math.inf if suffix else 0.15,
        note=f"mean of {len(errors)} micro-batches, worst {max(errors):.3f}",
    )
    for name, peer in contenders.items():
        if not name.startswith(PEER):
            continue
        for metric, other in (("adaptive", ADAPTIVE), ("ours", name.removeprefix(f"{PEER}, "))):
            ratio = None if peer["problem"] else paired_ratio(peer["times_ms"], contenders[other]["times_ms"])
            session.metric(
                f"{metric}_over_deepspeed_ulysses{suffix}",
                ratio.median if ratio else math.nan,
                note=f"{other}, {ratio}" if ratio else peer["problem"],
            )


def run(session: Session) -> None:
    """Measure all settings and report."""
    session.machine["deepspeed"] = package_version("deepspeed")
    for number, setting in enumerate(settings(quick=session.quick)):
        rows = session.part(setting.name, lambda setting=setting: measure(setting, session))  # type: ignore[misc]
        for row in rows:
            session.row(**row)
        report(rows, session, suffix=f"_{setting.name}" if number else "")


if __name__ == "__main__":
    main("sequence_parallel", run, rounds=7)
