"""The training benchmark: contenders are held against the plain way, and who does not do the work is not compared."""

import io
import math
from functools import partial

import pytest
from rich.console import Console
from torch import Tensor

from benchmarks.harness import Row, Session
from benchmarks.training import Comparison, Family, compare, families, measure
from benchmarks.training_contenders import deepspeed_engines, ours, plain_torch
from benchmarks.training_contenders.base import Contender, Factory, Job, Reference
from distrain.core.vocabulary import ModelShape

TINY = ModelShape(d_model=32, num_layers=8, num_heads=4, num_kv_heads=2, d_ffn=64, vocab_size=64)
DATA = Job(shape=TINY, seq_len=16, global_batch=8)
PIPELINE = Job(shape=TINY, seq_len=16, global_batch=8, micro_batches=8)


def rows(job: Job, **contenders: Factory) -> dict[str, Row]:
    family = Family("test", job, contenders, [], steps_per_turn=1)
    session = Session("test", False, 1, None, Console(file=io.StringIO()))
    return {row["contender"]: row for row in measure(family, session)}


def assert_equal(found: dict[str, Row]) -> None:
    for name, row in found.items():
        assert not row["problem"], f"{name}: {row['problem']}, difference {row['difference']}"
        assert 0 < row["difference"] <= 1e-5
        assert row["tokens_per_s"] > 0


@pytest.mark.ranks
@pytest.mark.slow
def test_data_parallel_contenders_train_the_same() -> None:
    assert_equal(
        rows(
            DATA,
            ours_ddp=ours.ddp,
            ours_fsdp=ours.fsdp,
            ours_zero1=ours.zero1,
            ddp=plain_torch.ddp,
            fsdp2=plain_torch.fsdp2,
            zero=plain_torch.zero,
        )
    )


@pytest.mark.ranks
@pytest.mark.slow
def test_pipeline_contenders_train_the_same() -> None:
    assert_equal(
        rows(
            PIPELINE,
            ours_1f1b=ours.pipeline_1f1b,
            ours_zbv=ours.pipeline_zbv,
            plain_1f1b=plain_torch.pipeline_1f1b,
            plain_zbv=plain_torch.pipeline_zbv,
        )
    )


class Skips:
    """A contender that leaves out what ``what`` names."""

    def __init__(self, rank: int, world_size: int, job: Job, *, what: str) -> None:
        self._what, self._plain, self._steps = what, Reference(rank, world_size, job), 0
        self._is_first = rank == 0

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        self._steps += 1
        if self._what == "a step" and self._steps == 2:
            return self._plain.loss(inputs, targets) if self._is_first else None
        if self._what == "half of the batch":
            inputs, targets = inputs[: len(inputs) // 2], targets[: len(targets) // 2]
        loss = self._plain.step(inputs, targets)
        return loss if self._is_first else None

    def finish(self) -> None:
        """Nothing runs on."""

    def weights(self) -> dict[str, Tensor]:
        named = self._plain.weights()
        if self._what == "a parameter":
            named.popitem()
        return named


@pytest.mark.ranks
@pytest.mark.slow
def test_who_skips_work_is_marked_and_not_compared() -> None:
    skipped = ("nothing", "a step", "half of the batch", "a parameter")
    found = rows(DATA, **{what: partial(Skips, what=what) for what in skipped})
    assert not found["nothing"]["problem"]
    for what in skipped[1:]:
        assert "differ" in found[what]["problem"], what
        value, note = compare(Comparison("metric", "nothing", what, 1.0), found)
        assert math.isnan(value)
        assert note.startswith(what)


class Breaks:
    """A contender that cannot be built on one of the ranks."""

    def __new__(cls, rank: int, world_size: int, job: Job) -> Contender:  # type: ignore[misc]
        if rank == 1:
            raise RuntimeError("no such thing here")
        return Reference(rank, world_size, job)


@pytest.mark.ranks
def test_a_contender_that_breaks_does_not_stop_the_others() -> None:
    found = rows(DATA, broken=Breaks, plain=plain_torch.ddp)
    assert "rank 1 failed" in found["broken"]["problem"]
    assert math.isnan(found["broken"]["tokens_per_s"])
    assert found["plain"]["tokens_per_s"] > 0


def row(name: str, *times_ms: float, problem: str = "") -> Row:
    return {"contender": name, "times_ms": list(times_ms), "problem": problem}


def test_a_metric_is_their_time_over_ours_round_by_round() -> None:
    found = {"ours": row("ours", 1.0, 10.0, 2.0), "theirs": row("theirs", 1.5, 15.0, 3.0)}
    value, _ = compare(Comparison("metric", "ours", "theirs", 1.2), found)
    assert value == pytest.approx(1.5)


def test_a_question_of_a_few_per_cent_needs_a_narrow_interval() -> None:
    found = {"ours": row("ours", 1.0, 1.0, 1.0), "theirs": row("theirs", 0.8, 1.0, 1.2)}
    assert compare(Comparison("metric", "ours", "theirs", 0.97), found)[0] == pytest.approx(1.0)
    assert math.isnan(compare(Comparison("metric", "ours", "theirs", 0.97, overhead=0.03), found)[0])


def test_a_peer_that_is_not_installed_gives_nan_and_says_how_to_get_it() -> None:
    value, note = compare(Comparison("metric", "ours", "theirs"), {"ours": row("ours", 1.0)})
    assert math.isnan(value)
    assert deepspeed_engines.HINT in note


def test_every_comparison_names_contenders_and_every_model_is_large_enough() -> None:
    metrics = []
    for family in families():
        assert family.job.shape.num_params >= 3_000_000
        for comparison in family.comparisons:
            metrics.append(comparison.metric)
            assert {comparison.ours, comparison.theirs} <= family.contenders.keys()
    assert {
        "ddp_over_torch_ddp",
        "fsdp_over_torch_fsdp2",
        "pp_over_torch_1f1b",
        "pp_over_deepspeed",
        "zero1_over_deepspeed_zero1",
    } <= set(metrics)
