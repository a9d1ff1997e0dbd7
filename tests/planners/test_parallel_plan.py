"""Plans as files."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distrain.core.errors import ConfigError
from distrain.core.vocabulary import DataParallel, Degrees, Schedule
from distrain.planners.parallel_plan import ParallelPlan

PLAN = ParallelPlan(
    world_size=16,
    degrees=Degrees(tp=2, pp=2, dp=4, vpp=2, dp_shard=4),
    schedule=Schedule.INTERLEAVED,
    data=DataParallel.FSDP2,
    micro_batches=4,
    placement=(tuple(range(8, 16)), tuple(range(8))),
    objective=1.5,
    bound=1.5,
    gap=0.0,
    status="optimal over the grid",
    seconds=0.1,
    reasons=("because",),
)


def broken(**changes: Any) -> str:
    return json.dumps(json.loads(PLAN.to_json()) | changes)


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    for plan in (PLAN, ParallelPlan(world_size=4, degrees=Degrees(dp=4))):
        plan.save(tmp_path / "runs" / "plan.json")
        assert ParallelPlan.load(tmp_path / "runs" / "plan.json") == plan
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["plan.json"]


def test_a_save_that_fails_leaves_the_old_plan_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)

    def full(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        replace(PLAN, objective=9.0).save(path)
    assert ParallelPlan.load(path) == PLAN
    assert list(tmp_path.iterdir()) == [path]


def test_an_open_pipe_is_written_to_and_a_loop_of_links_refused(tmp_path: Path) -> None:
    source, sink = os.pipe()
    with os.fdopen(source) as reader:
        with os.fdopen(sink, "w"):
            PLAN.save(Path(f"/proc/self/fd/{sink}"))
        assert ParallelPlan.from_json(reader.read()) == PLAN
    loop = tmp_path / "plan.json"
    loop.symlink_to(tmp_path / "other.json")
    (tmp_path / "other.json").symlink_to(loop)
    with pytest.raises(FileExistsError):
        PLAN.save(loop / "plan.json")


def test_every_problem_of_a_file_is_listed_at_once() -> None:
    text = broken(
        degrees={"tp": "2"}, schedule="1f2b", data="zero9", version=7, micro_batches=True, objektive=3
    )
    with pytest.raises(ConfigError) as caught:
        ParallelPlan.from_json(text)
    found = str(caught.value)
    for word in (
        "degrees",
        "1f2b",
        "zero9",
        "version",
        "micro_batches",
        "objektive",
        "did you mean objective?",
    ):
        assert word in found
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"world_size": 32}, "leaves ranks over"),
        ({"micro_batches": 3}, "not a multiple of pp"),
        ({"micro_batches": 0}, "out of range"),
        ({"schedule": "gpipe"}, "fixes the stages a rank"),
        ({"data": "ddp"}, "fixes dp_shard"),
        ({"placement": [[0, 1], [1, 2]]}, "place every rank once"),
        ({"placement": [0, 1]}, "placement is wrong"),
        ({"objective": "fast"}, "objective is wrong"),
        ({"gap": float("nan")}, "gap is wrong"),
        ({"reasons": "because"}, "reasons is wrong"),
        ({"degrees": {"tp": 2, "cp": 2}}, "degrees is wrong"),
    ],
)
def test_a_plan_that_no_mesh_can_be_built_from_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ParallelPlan.from_json(broken(**changes))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="lacks degrees"):
        ParallelPlan.from_json('{"version": 1, "world_size": 4}')
    with pytest.raises(ConfigError, match="lacks version"):
        ParallelPlan.from_json('{"world_size": 1, "degrees": {}}')


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not"):
        ParallelPlan.from_json(text)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ParallelPlan.load(tmp_path / "none.json")
    assert "none.json" in str(caught.value)
