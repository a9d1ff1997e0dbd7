"""Plans that cannot be carried out are refused before anything starts: all problems in one message."""

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distrain.core import netns
from distrain.core.errors import ConfigError, raise_if
from distrain.core.vocabulary import FaultKind
from distrain.faults.inject import FaultPlan, JobShape, check
from distrain.faults.inject.capabilities import HINTS, Capabilities, probe
from distrain.faults.inject.engines import ENGINES, installer
from distrain.faults.inject.kinds import KINDS

JOB = JobShape(world_size=4, num_nodes=2, steps=10)
ALL = Capabilities(dict.fromkeys(HINTS, "here"))


def errors(plan: FaultPlan, job: JobShape = JOB, capabilities: Capabilities = ALL) -> list[str]:
    return [problem.error for problem in check(plan, job, capabilities=capabilities)]


def test_a_plan_of_every_kind_that_is_built_has_no_problem() -> None:
    plan = FaultPlan()
    for step, (kind, spec) in enumerate(KINDS.items(), start=1):
        if spec.refused:
            continue
        targets: dict[str, dict[str, Any]] = {"rank": {"ranks": [1]}, "link": {"link": (1, 0)}, "job": {}}
        plan = plan.inject(kind, **targets.get(spec.victim, {"node": 1})).at(step=min(step, 10), op=step)
        if spec.lasting != "not":
            plan = plan.lasting(1.0)
    assert len(plan.faults) == sum(not spec.refused for spec in KINDS.values()) >= 32
    assert errors(plan, replace(JOB, has_network=True)) == []


def test_every_kind_stands_in_the_table_with_an_engine_or_a_reason() -> None:
    assert set(KINDS) == set(FaultKind)
    for spec in KINDS.values():
        assert bool(spec.refused) != (spec.engine in ENGINES)
    for engine in ENGINES:
        assert callable(installer(engine))


def test_all_problems_come_at_once() -> None:
    plan = (
        FaultPlan()
        .kill(ranks=[4])
        .inject("proc.sigstop", node=2)
        .inject("proc.exit", ranks=[0], cod=3)
        .inject("proc.exit", ranks=[1], code=256)
        .inject("net.drop", link=(0, 1))
        .inject("proc.gil_hog", ranks=[0])
        .inject("data.stall", ranks=[0], phase="gradients")
        .lasting(1)
        .inject("numeric.nan", ranks=[0], where="in_colective")
        .inject("comm.skip", ranks=[0], collective="allreduce")
        .at(step=0)
        .kill(ranks=[0])
        .at(step=11)
        .lasting(2.0)
        .expect("crash", suspects=[7], within_s=0)
    )
    with pytest.raises(ConfigError) as caught:
        raise_if(check(plan, JOB, capabilities=ALL))
    assert [problem.error for problem in caught.value.problems] == [
        "faults[0], proc.sigkill, hits ranks that there are not",
        "faults[1], proc.sigstop, hits a node that there is not",
        "faults[2], proc.exit, has no parameter cod",
        "faults[3], proc.exit, cannot have this code",
        "faults[4], net.drop, has nothing to hit",
        "faults[5], proc.gil_hog, needs a duration",
        "faults[6], data.stall, does not happen in this phase",
        "faults[7], numeric.nan, does not happen there",
        "faults[8], comm.skip, begins before the first step",
        "faults[8], comm.skip, cannot have this collective",
        "faults[9], proc.sigkill, begins after the last step",
        "faults[9], proc.sigkill, is over at once",
        "faults[9], proc.sigkill, expects suspects that there are not",
        "faults[9], proc.sigkill, expects too much",
    ]
    hints = {problem.error: problem.hint for problem in caught.value.problems}
    assert hints["faults[2], proc.exit, has no parameter cod"] == "code"
    assert hints["faults[8], comm.skip, cannot have this collective"] == "all_reduce"


@pytest.mark.parametrize("kind", [kind for kind, spec in KINDS.items() if spec.refused])
def test_a_kind_without_a_target_is_refused_with_the_reason(kind: FaultKind) -> None:
    (problem,) = check(FaultPlan().inject(kind, ranks=[0]), JOB, capabilities=ALL)
    assert "cannot be injected yet" in problem.error
    assert problem.got == KINDS[kind].refused


def test_targets_that_do_not_fit_a_kind_are_refused() -> None:
    assert errors(FaultPlan().inject("proc.exit")) == ["faults[0], proc.exit, hits nobody"]
    assert errors(FaultPlan().inject("store.kill", ranks=[0])) == ["faults[0], store.kill, hits no ranks"]
    for kind in ("store.kill", "coordinator.kill"):
        assert errors(FaultPlan().inject(kind, node=1)) == [f"faults[0], {kind}, hits what node 0 has"]
        assert errors(FaultPlan().inject(kind, node=0)) == []
    assert errors(FaultPlan().inject("ckpt.eio", ranks=[0])) == [
        "faults[0], ckpt.eio, hits keepers, which have no ranks"
    ]
    assert errors(FaultPlan().inject("ckpt.eio", ranks=[0], role="trainer")) == []
    assert errors(FaultPlan().inject("proc.exit", ranks=[0], role="keeper")) == [
        "faults[0], proc.exit, has no choice of process"
    ]
    assert errors(FaultPlan().kill(node=0), JobShape(world_size=4)) == [
        "faults[0], node.loss, would leave nobody"
    ]
    apart = replace(JOB, has_network=True)
    assert errors(FaultPlan().inject("net.rate", node=1), apart) == [
        "faults[0], net.rate, hits nobody",
        "faults[0], net.rate, hits a link, no node or rank",
    ]
    assert errors(FaultPlan().inject("net.loss", link=(1, 1)), apart) == ["faults[0], net.loss, hits no link"]
    assert errors(FaultPlan().inject("net.loss", link=(0, 2)), apart) == [
        "faults[0], net.loss, hits a link that there is not"
    ]
    assert errors(FaultPlan().inject("net.partition", node=1, link=(0, 1)), apart) == [
        "faults[0], net.partition, hits no link"
    ]
    unsaved = JobShape(world_size=4, has_checkpoints=False)
    plan = FaultPlan().kill(role="keeper").inject("ckpt.torn").kill(role="coordinator")
    assert errors(plan, unsaved) == [
        "faults[0], sidecar.kill, has nothing to hit",
        "faults[1], ckpt.torn, has nothing to hit",
        "faults[2], coordinator.kill, has nothing to hit",
    ]


@pytest.mark.parametrize(
    ("plan", "claim"),
    [
        (FaultPlan().kill(ranks=[1]).at(step=3).inject("proc.exit", ranks=[0, 1]).at(step=3), "life"),
        (FaultPlan().kill(node=0).at(step=3).kill(ranks=[1]).at(step=3), "life"),
        (
            FaultPlan()
            .inject("proc.sigstop", ranks=[1])
            .at(after_s=1)
            .lasting(2)
            .inject("cgroup.freeze", node=0)
            .at(after_s=2.5),
            "processor",
        ),
        (
            FaultPlan()
            .inject("proc.cpu_throttle", ranks=[1])
            .at(step=2)
            .inject("proc.sigstop", ranks=[1])
            .at(step=9),
            "processor",
        ),
        (FaultPlan().inject("comm.skip", ranks=[1]).inject("comm.delay", ranks=[1]), "collective"),
    ],
)
def test_two_faults_that_claim_the_same_of_one_victim_are_refused(plan: FaultPlan, claim: str) -> None:
    (error,) = errors(plan)
    assert error.endswith(f"claim the same {claim}")


@pytest.mark.parametrize(
    "plan",
    [
        FaultPlan().kill(ranks=[1]).at(step=3).kill(ranks=[1]).at(step=4),
        FaultPlan().kill(ranks=[1]).at(step=3).kill(ranks=[2]).at(step=3),
        FaultPlan().kill(node=1).at(step=3).kill(ranks=[1]).at(step=3),
        FaultPlan()
        .inject("proc.sigstop", ranks=[1])
        .at(after_s=1)
        .lasting(2)
        .inject("cgroup.freeze", ranks=[1])
        .at(after_s=3.5),
        FaultPlan().inject("comm.skip", ranks=[1]).at(op=1).inject("comm.delay", ranks=[1]).at(op=2),
    ],
)
def test_faults_at_other_times_or_of_other_victims_go_together(plan: FaultPlan) -> None:
    assert errors(plan) == []


def test_a_missing_privilege_is_named_with_the_way_to_get_it() -> None:
    plan = FaultPlan().inject("cgroup.freeze", ranks=[0]).at(step=1).inject("proc.oom", ranks=[1])
    problems = check(plan, JOB, capabilities=Capabilities())
    assert [problem.error for problem in problems] == [
        "faults[0], cgroup.freeze, needs what this machine does not allow",
        "faults[1], proc.oom, needs what this machine does not allow",
    ]
    (problem,) = check(
        FaultPlan().inject("net.drop", link=(0, 1)),
        replace(JOB, has_network=True),
        capabilities=Capabilities(),
    )
    assert problem.error == "faults[0], net.drop, needs what this machine does not allow"
    assert "user namespaces" in problem.hint and "/dev/net/tun" in problem.hint
    assert "freezer" in problems[0].got and "root" in problems[0].hint and "proc.sigstop" in problems[0].hint


def test_what_python_lets_somebody_write_is_refused_as_in_a_file() -> None:
    ranks: Any = ["0"]
    step: Any = "3"
    plan = FaultPlan().inject("data.stall", ranks=ranks).at(step=step).lasting(float("nan"))
    assert errors(plan) == [
        "faults[0].duration_s cannot be this",
        "faults[0].target.ranks cannot be this",
        "faults[0].at.step cannot be this",
    ]


def test_the_probe_says_how_and_leaves_nothing() -> None:
    found = probe().found
    assert all(how.startswith("cgroup v") for name, how in found.items() if name not in ("network", "clock"))
    assert ("network" in found) == (netns.missing() == "")
    assert not any(probe().lacks(name) for name in found)


def test_the_page_on_faults_lists_every_kind_that_is_built_with_its_parameters() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/faults.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    listed = {row[1].strip(" `"): (set(re.findall(r"`(\w+)`", row[2])), row[3].strip()) for row in rows}
    assert listed == {
        str(kind): (set(spec.params), "" if spec.lasting == "not" else str(spec.lasting))
        for kind, spec in KINDS.items()
        if not spec.refused
    }


def test_the_plan_on_the_page_is_one_that_can_be_carried_out() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/faults.md").read_text()
    plan = FaultPlan.from_json(tomllib.loads(page.split("```toml")[1].split("```")[0]))
    assert len(plan.faults) == 1
    assert errors(plan) == []
