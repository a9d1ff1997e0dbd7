"""The plan of a step as a thing of its own: written, read, replayed, and convicted of every mistake."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from distrain.core.errors import ConfigError
from distrain.planners.sequence import SequenceCost, SequenceGroup, StepPlan, check_plan
from distrain.planners.sequence.step_plan import step_ms

COST = SequenceCost(
    alpha1=0.0,
    alpha2=1.0,
    beta1=10.0,
    layers=1,
    hidden=65_536,  # one megabyte a token
    tokens_per_gpu=100,
    bandwidth_gb_s={2: 1.0, 4: 0.5},
)
LENGTHS = (150, 40, 60, 100)


def group(first: int, degree: int, *sequences: int) -> SequenceGroup:
    ranks = tuple(range(first, first + degree))
    return SequenceGroup(ranks, sequences, COST.group_ms([LENGTHS[each] for each in sequences], degree))


def plan(**changes: object) -> StepPlan:
    """[0 on 2 slots, 1 and 2 on one, one idle], then [3]."""
    batches = ((group(0, 2, 0), group(2, 1, 1, 2)), (group(0, 1, 3),))
    fields = {
        "microbatches": batches,
        "num_slots": 4,
        "estimated_ms": step_ms(batches, num_slots=4, schedule="lock-step"),
        "lower_bound_ms": 50.0,
        "gap": 0.5,
        "status": "feasible",
        "seconds": 0.1,
        "baselines": {"static": 400.0, "batch_adaptive": 300.0},
        "reasons": ("by hand",),
    }
    return StepPlan(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_group_time_is_the_formula_of_the_paper() -> None:
    assert COST.megabytes_per_token == 1.0
    assert COST.group_ms([40, 60], 1) == 40 + 60 + 10
    assert COST.group_ms([150], 2) == 150 / 2 + 150 / 2 / 1.0 + 10
    assert COST.group_ms([150], 4) == pytest.approx(150 / 4 + 150 / 4 / 0.5 + 10)


def test_a_step_in_lock_step_is_the_sum_of_its_slowest_groups() -> None:
    assert plan().estimated_ms == 160 + 110


def test_without_barriers_a_group_starts_when_its_own_slots_are_free() -> None:
    batches = ((group(0, 2, 0), group(2, 1, 1)), (group(2, 1, 2), group(3, 1, 3)))
    assert step_ms(batches, num_slots=4, schedule="lock-step") == 160 + 110
    assert step_ms(batches, num_slots=4, schedule="asynchronous") == 160


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plan.json"
    plan().save(path)
    assert StepPlan.load(path) == plan()
    data = json.loads(path.read_text())
    assert data["microbatches"][0][0] == {
        "ranks": [0, 1],
        "degree": 2,
        "sequences": [0],
        "estimated_ms": 160.0,
    }
    assert data["baselines"] == {"static": 400.0, "batch_adaptive": 300.0}
    assert [each.name for each in path.parent.iterdir()] == ["plan.json"]


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    link, target, pipe = (tmp_path / name for name in ("link", "plan.json", "pipe"))
    link.symlink_to(target)
    plan().save(link)
    assert link.is_symlink()
    assert StepPlan.load(target) == plan()
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    plan().save(pipe)
    assert StepPlan.from_json(os.read(end, 1 << 16).decode()) == plan()
    os.close(end)
    assert pipe.is_fifo()


def test_a_good_plan_has_no_problems() -> None:
    assert check_plan(plan(), LENGTHS, COST) == []


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (((group(0, 2, 0), group(1, 1, 1, 2)), (group(0, 1, 3),)), "share ranks"),
        (((group(0, 2, 0), group(4, 1, 1, 2)), (group(0, 1, 3),)), "rank that is not there"),
        (((group(0, 2, 0), group(2, 1, 1, 2)),), "left out"),
        (((group(0, 2, 0), group(2, 1, 1, 2)), (group(0, 1, 3), group(1, 1, 1))), "more than once"),
        (((SequenceGroup((1, 0), (0,), 160.0), group(2, 1, 1, 2)), (group(0, 1, 3),)), "not ascending"),
        (((SequenceGroup((), (0,), 160.0), group(2, 1, 1, 2)), (group(0, 1, 3),)), "not ascending"),
        (
            ((group(0, 2, 0), group(2, 1, 1, 2)), (SequenceGroup((0,), (4,), 1.0),)),
            "sequence that is not there",
        ),
        (((group(0, 1, 0), group(2, 1, 1, 2)), (group(0, 1, 3),)), "memory"),
        (
            ((SequenceGroup((0, 1, 2), (0,), 160.0), group(3, 1, 1, 2)), (group(0, 1, 3),)),
            "degree of no known bandwidth",
        ),
        (
            ((replace(group(0, 2, 0), estimated_ms=9.0), group(2, 1, 1, 2)), (group(0, 1, 3),)),
            "not what its sequences",
        ),
    ],
)
def test_every_mistake_in_a_plan_is_found(
    batches: tuple[tuple[SequenceGroup, ...], ...], message: str
) -> None:
    found = check_plan(plan(microbatches=batches), LENGTHS, COST)
    assert any(message in problem.error for problem in found), found


def test_a_step_time_or_a_bound_that_is_wrong_is_found() -> None:
    assert "step's time" in check_plan(plan(estimated_ms=200.0), LENGTHS, COST)[0].error
    assert "bound is above" in check_plan(plan(lower_bound_ms=271.0), LENGTHS, COST)[0].error


def test_a_file_that_is_no_plan_is_refused_with_every_problem() -> None:
    data = json.loads(plan().to_json())
    del data["gap"]
    data["num_slot"] = data.pop("num_slots")
    data["schedule"] = "sometimes"
    data["microbatches"][0][0]["degree"] = 3
    data["version"] = 9
    with pytest.raises(ConfigError) as caught:
        StepPlan.from_json(json.dumps(data), source="p.json")
    text = str(caught.value)
    for part in (
        "lacks gap",
        "lacks num_slots",
        "did you mean num_slots",
        "schedule is wrong",
        "microbatches",
        "version",
    ):
        assert part in text
    with pytest.raises(ConfigError, match="not JSON"):
        StepPlan.from_json("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        StepPlan.load("nowhere.json")
