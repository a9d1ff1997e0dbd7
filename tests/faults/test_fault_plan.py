"""Plans: one meaning in Python, TOML and JSON, chance that is known beforehand, and files that are refused whole."""

import json
from pathlib import Path

import pytest

from distrain.core.errors import ConfigError
from distrain.core.vocabulary import FaultKind, IncidentClass
from distrain.faults.inject import FaultPlan, JobShape
from distrain.faults.inject.capabilities import Capabilities
from distrain.faults.inject.plan import At, Expect, Fault, Target

TOML = """
seed = 7
[[faults]]
kind = "proc.sigstop"
target = { ranks = [1], where = "in_collective" }
at = { step = 3, op = 2 }
duration_s = 2
expect = { incident = "frozen", suspects = [1], within_s = 5.0 }
[[faults]]
kind = "ckpt.enospc"
target = { node = 0 }
probability = 0.5
params = { operation = "fsync", times = 2 }
"""

FLUENT = (
    FaultPlan(seed=7)
    .inject("proc.sigstop", ranks=[1], where="in_collective")
    .at(step=3, op=2)
    .lasting(2.0)
    .expect("frozen", suspects=[1], within_s=5.0)
    .inject("ckpt.enospc", node=0, operation="fsync", times=2)
    .with_probability(0.5)
)


def write(folder: Path, text: str, *, name: str = "plan.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_says_the_same_as_the_calls(tmp_path: Path) -> None:
    assert FaultPlan.load(write(tmp_path, TOML)) == FLUENT
    stop, full = FLUENT.faults
    assert stop == Fault(
        kind=FaultKind.PROC_STOP,
        target=Target(ranks=(1,), where="in_collective"),
        at=At(step=3, op=2),
        duration_s=2.0,
        expect=Expect(incident=IncidentClass.FROZEN, suspects=(1,), within_s=5.0),
    )
    assert (full.params, full.probability) == ({"operation": "fsync", "times": 2}, 0.5)


def test_a_plan_survives_json(tmp_path: Path) -> None:
    text = json.dumps(FLUENT.to_json())
    assert FaultPlan.from_json(json.loads(text)) == FLUENT
    assert FaultPlan.load(write(tmp_path, text, name="plan.json")) == FLUENT
    assert FLUENT.to_json()["faults"][1] == {
        "kind": "ckpt.enospc",
        "target": {"node": 0},
        "params": {"operation": "fsync", "times": 2},
        "probability": 0.5,
    }


def test_kill_means_what_it_is_told_to_kill() -> None:
    plan = FaultPlan().kill(ranks=[1]).kill(role="keeper", node=1).kill(role="store").kill(node=0)
    assert [fault.kind for fault in plan.faults] == [
        "proc.sigkill",
        "sidecar.kill",
        "store.kill",
        "node.loss",
    ]
    with pytest.raises(ConfigError, match="no such process"):
        FaultPlan().kill(role="kepeer")


def test_whether_a_fault_happens_depends_on_seed_number_and_victim_alone() -> None:
    plan = FaultPlan(seed=1).kill(ranks=range(1000)).with_probability(0.3).kill(ranks=range(1000))
    drawn = [plan.is_drawn(0, rank) for rank in range(1000)]
    assert drawn == [plan.is_drawn(0, rank) for rank in range(1000)]
    assert 200 < sum(drawn) < 400
    assert all(plan.is_drawn(1, rank) for rank in range(1000))
    other = FaultPlan(plan.faults, seed=2)
    assert drawn != [other.is_drawn(0, rank) for rank in range(1000)]


def test_everything_wrong_with_a_file_is_in_one_message(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        sed = 7
        [[faults]]
        kind = "proc.sigkil"
        target = { rank = [1], node = 3 }
        [[faults]]
        kind = "proc.sigstop"
        params = { quota = 0.5 }
        target = { ranks = "1" }
        at = { step = 1.5 }
        duration = 3
        expect = { incident = "frosen" }
        [[faults]]
        target = { ranks = [0] }
        [[faults]]
        kind = "numeric.nan"
        target = { ranks = [9] }
        """,
    )
    with pytest.raises(ConfigError) as caught:
        FaultPlan.load(path, job=JobShape(world_size=2), capabilities=Capabilities())
    message = str(caught.value)
    assert [problem.error for problem in caught.value.problems] == [
        "there is no key sed",
        "faults[0].kind cannot be this",
        "there is no key faults[0].target.rank",
        "there is no key faults[1].duration",
        "faults[1].target.ranks cannot be this",
        "faults[1].at.step cannot be this",
        "faults[1].expect.incident cannot be this",
        "faults[2] has no kind",
        "faults[0] hits a node that there is not",
        "faults[1], proc.sigstop, has no parameter quota",
        "faults[3], numeric.nan, hits ranks that there are not",
    ]
    for hint in (
        "seed",
        'kind = "proc.sigkill"',
        "faults[0].target.ranks",
        "faults[1].duration_s",
        '"frozen"',
    ):
        assert f"try: {hint}" in message or hint in message


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("plan.yaml", "", "not the name of a fault plan"),
        ("plan.toml", "seed = ", "not valid TOML"),
        ("plan.json", "[1]", "not a table"),
        ("plan.json", '{"version": 2}', "another version"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, name: str, text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        FaultPlan.load(write(tmp_path, text, name=name))
    with pytest.raises(ConfigError, match="cannot be read"):
        FaultPlan.load(tmp_path / "missing.toml")


def test_calls_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ConfigError, match="no such kind") as caught:
        FaultPlan().inject("proc.sigkil", ranks=[1])
    assert caught.value.problems[0].hint == "proc.sigkill"
    with pytest.raises(ConfigError, match="no fault yet"):
        FaultPlan().at(step=1)
    with pytest.raises(ConfigError, match="no such incident"):
        FaultPlan().kill(ranks=[0]).expect("frosen")
