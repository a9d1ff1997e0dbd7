"""The benchmark of the planned allocator measures steps that follow their plan, and says when it does not know."""

import json
import math
import shutil
from pathlib import Path

import pytest

from benchmarks import allocator
from benchmarks.allocator import Job, Overhead, allocator_overhead, run, same_weights
from benchmarks.harness import main
from distrain.activation.allocator import AllocationPlan

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_both_kinds_of_steps_are_timed_in_each_round_and_the_plan_is_followed() -> None:
    overhead = allocator_overhead(rounds=2, length=16)
    assert overhead.report.hit_rate == 1.0
    assert overhead.report.hits > 4 * 100
    times = (overhead.plain_s, overhead.planned_s, overhead.plain_wall_s, overhead.planned_wall_s)
    assert all(len(each) == 2 and min(each) > 0 for each in times)


class Lazy(Job):
    """Stops training when its plan is made."""

    def plan(self) -> AllocationPlan:
        made = super().plan()
        self.step = lambda: None  # type: ignore[method-assign]
        return made


def test_steps_that_end_with_other_weights_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert same_weights(steps=2, length=16)
    monkeypatch.setattr(allocator, "Job", Lazy)
    assert not same_weights(steps=2, length=16)


def test_rounds_that_do_not_agree_are_no_result() -> None:
    report = allocator_overhead(rounds=1, length=16).report

    def resolved(ratios: list[float]) -> float:
        ones = [1.0] * len(ratios)
        return Overhead(
            plain_s=ones, planned_s=ratios, plain_wall_s=ones, planned_wall_s=ones, report=report
        ).resolved

    assert resolved([0.99, 1.0, 1.01] * 5) == 1.0
    assert resolved([1.09, 1.1, 1.11] * 5) == 1.1
    assert math.isnan(resolved([0.8, 1.0, 1.2] * 5))


def test_its_file_holds_the_metrics(tmp_path: Path) -> None:
    main("allocator", run, ["--quick", "--json", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    assert set(found["metrics"]) == {"allocator_overhead", "hit_rate"}
    assert found["metrics"]["hit_rate"] == 1.0
    assert {row["request"] for row in found["rows"][1:]} == {
        "from the arena",
        "fallen back",
        "small, passing by",
    }
