"""Faults in real jobs: training, keepers, the launcher's store, emulated nodes. The job feels them as it would."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distrain.core.events import read_events
from distrain.core.sidecar_client import KeeperLost
from distrain.faults.inject import FaultPlan, Injector, read_truth
from helpers.keeper_processes import kill_keepers
from helpers.keepers import Keepers, Rank, alive, committed, config_of, is_saved, keepers_in, local, until
from helpers.runs import write_run
from helpers.victims import LOOP, ROOT, Scene, wait_until

pytestmark = pytest.mark.processes

# -- training --------------------------------------------------------------------------------------------------


def train(folder: Path, plan: FaultPlan, *, name: str, every: int = 0) -> "subprocess.CompletedProcess[str]":
    """Train on two ranks under ``plan``; a run of the same name goes on where it was."""
    config = write_run(folder, name=name, steps=7, every=every)
    with Injector(plan, folder / f"{name}-truth") as injector:
        return subprocess.run(
            [sys.executable, "-m", "distrain", "train", str(config)],
            cwd=ROOT,
            env={**os.environ, **injector.variables, "XDG_RUNTIME_DIR": str(folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )


def scalars(folder: Path, name: str, scalar: str) -> dict[int, float]:
    """The last value reported of each step."""
    events = read_events(folder / name / "events.jsonl")
    return {
        e.step: e.value for e in events if e.name == scalar and e.step is not None and e.value is not None
    }


@pytest.mark.timeout(240)
def test_training_meets_its_faults_in_the_steps_of_the_plan(tmp_path: Path) -> None:
    plan = (
        FaultPlan()
        .inject("data.corrupt", ranks=[1])
        .at(step=3)
        .inject("data.stall", ranks=[0])
        .at(step=5)
        .lasting(2.0)
        .inject("numeric.nan", ranks=[1])
        .at(step=6)
    )
    assert train(tmp_path, FaultPlan(), name="sound").returncode == 0
    done = train(tmp_path, plan, name="spoilt")
    assert done.returncode == 0, done.stderr
    sound, spoilt = (scalars(tmp_path, name, "loss") for name in ("sound", "spoilt"))
    assert [step for step in range(1, 7) if sound[step] == spoilt[step]] == [1, 2]
    norms = scalars(tmp_path, "spoilt", "grad_norm")
    assert [step for step in norms if math.isnan(norms[step])] == [6, 7]
    assert [step for step in spoilt if math.isnan(spoilt[step])] == [7]
    seconds = scalars(tmp_path, "spoilt", "seconds")
    assert seconds[4] + seconds[5] >= 2.0  # data are read while the step before computes
    records = read_truth(tmp_path / "spoilt-truth")
    assert {(record.fault, record.victim, record.step) for record in records} == {
        (0, 1, 3),
        (1, 0, 5),
        (2, 1, 6),
    }


@pytest.mark.timeout(240)
def test_a_killed_job_goes_on_from_its_checkpoint_without_meeting_the_fault_again(tmp_path: Path) -> None:
    plan = FaultPlan().kill(ranks=[1]).at(step=4)
    try:
        broken = train(tmp_path, plan, name="run", every=1)
        assert broken.returncode == 1 and "SIGKILL" in broken.stderr
        assert max(scalars(tmp_path, "run", "loss")) == 3
        again = train(tmp_path, plan, name="run", every=1)
        assert again.returncode == 0, again.stderr
        assert "resumed after step" in again.stdout
        assert max(scalars(tmp_path, "run", "loss")) == 7
    finally:
        kill_keepers(tmp_path)
    assert [(record.victim, record.step) for record in read_truth(tmp_path / "run-truth")] == [(1, 4)]


# -- keepers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def keepers(tmp_path: Path) -> Iterator[Keepers]:
    with keepers_in(tmp_path) as found:
        yield found


def test_the_keepers_disk_fails_for_one_checkpoint(keepers: Keepers, scene: Scene, tmp_path: Path) -> None:
    tier = local(tmp_path)
    plan = FaultPlan().inject("ckpt.eio", operation="fsync").at(step=2)
    with scene.injector(plan) as injector:
        keepers.environ = {**keepers.environ, **injector.variables}
        rank = keepers.rank(config_of(tier, num_attempts=1))
        for step in (1, 2, 3):
            assert rank.save(step)
            rank.client.wait(step, level="committed", timeout_s=30)
        keepers.close()
    assert set(committed(tier.url)) == {1, 3}
    assert is_saved(tier.url, 3)
    (record,) = scene.records()
    assert (record.kind, record.step, record.detail["path"].endswith("/data/0/0")) == ("ckpt.eio", 2, True)


def test_a_keeper_is_killed_when_a_rank_of_its_node_gets_to_a_step(keepers: Keepers, scene: Scene) -> None:
    with scene.injector(FaultPlan().kill(role="keeper").at(step=5)) as injector:
        keepers.environ = {**keepers.environ, **injector.variables}
        rank = keepers.rank(config_of(local(scene.folder)))
        pid = int(rank.client.status()["pid"])
        elsewhere = scene.victim(injector, rank=1, node=1)
        elsewhere.reach(10)
        assert alive(pid)
        victim = scene.victim(injector)
        until(lambda: not alive(pid), "end of the keeper")
        victim.reach(10)  # no rank is hit
        until(lambda: saves(rank, 1), "a snapshot by another keeper")
        assert int(rank.client.status()["pid"]) != pid
        keepers.close()
        (record,) = scene.records()
    assert (record.kind, record.victim, record.pid, record.step) == ("sidecar.kill", 0, pid, 5)


def test_the_coordinator_is_killed_and_another_one_commits_what_comes(keepers: Keepers, scene: Scene) -> None:
    """Two nodes: the other one's keeper lives on, and finds the keeper that takes the first one's place."""
    tier = local(scene.folder)
    plan = FaultPlan().kill(role="coordinator").at(step=5)
    with scene.injector(plan) as injector:
        keepers.environ = {**keepers.environ, **injector.variables}
        ranks = [
            keepers.rank(config_of(tier), rank=node, world_size=2, node_rank=node, num_nodes=2)
            for node in (0, 1)
        ]
        save_all(ranks, 1)
        coordinator, other = (int(rank.client.status()["pid"]) for rank in ranks)
        scene.victim(injector)
        until(lambda: not alive(coordinator), "end of the coordinator")
        save_all(ranks, 2)
        assert int(ranks[1].client.status()["pid"]) == other
        keepers.pids.add(int(ranks[0].client.status()["pid"]))
        keepers.close()
        (record,) = scene.records()
    assert (record.kind, record.pid, record.step) == ("coordinator.kill", coordinator, 5)
    assert is_saved(tier.url, 2, world_size=2)


def save_all(ranks: list[Rank], step: int) -> None:
    """Save a step on all ranks, and wait for its commit, however often a keeper has to be found."""
    for rank in ranks:
        until(lambda rank=rank: saves(rank, step), "a snapshot")  # type: ignore[misc]
    until(lambda: is_committed(ranks[0], step), "a commit")


def is_committed(rank: Rank, step: int) -> bool:
    try:
        return rank.client.wait(step, level="committed", timeout_s=30).reached
    except KeeperLost:
        return False


def saves(rank: Rank, step: int) -> bool:
    """Whether there is a keeper to save a step."""
    try:
        return rank.save(step)
    except KeeperLost:
        return False


def test_a_keeper_that_is_not_there_cannot_be_killed(scene: Scene) -> None:
    with scene.injector(FaultPlan().kill(role="keeper").at(step=2)) as injector:
        scene.victim(injector).reach(5)
    assert [record.detail for record in scene.records("failed")] == [{"reason": "no such process"}]


# -- the launcher ----------------------------------------------------------------------------------------------


class Job:
    """A launcher with ranks that take steps for ever."""

    def __init__(self, folder: Path, injector: Injector, *flags: str) -> None:
        self.folder = folder
        script = folder / "loop.py"
        script.write_text(
            "import sys, os; sys.argv[1:] = [os.environ['STEPS'] + os.environ['RANK'], '1']\n"
            + LOOP.format(work="time.sleep(0.005)")
        )
        variables = {"STEPS": str(folder / "steps-"), "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(folder)}
        with (folder / "stderr").open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distrain", "launch", *flags, str(script)],
                cwd=ROOT,
                env={**os.environ, **injector.variables, **variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    @property
    def errors(self) -> str:
        return (self.folder / "stderr").read_text()

    def last_step(self, rank: int) -> int:
        path = self.folder / f"steps-{rank}"
        words = path.read_text().split() if path.exists() else []
        return int(words[-1]) if words else 0

    def wait(self) -> int:
        try:
            return self.process.wait(45)
        finally:
            self.process.kill()
            self.process.wait()


def test_the_store_of_a_job_is_killed(scene: Scene) -> None:
    with scene.injector(FaultPlan().kill(role="store").at(step=3)) as injector:
        job = Job(scene.folder, injector, "--nproc-per-node", "2")
        assert job.wait() == 1
    assert "the rendezvous store ended" in job.errors
    (record,) = scene.records()
    assert record.kind == "store.kill"


def test_a_lost_node_takes_its_agent_and_its_ranks_with_it(scene: Scene) -> None:
    plan = FaultPlan().kill(node=1).at(step=5)
    with scene.injector(plan) as injector:
        job = Job(scene.folder, injector, "--emulate-nodes", "2", "--nproc-per-node", "2")
        (record,) = scene.until_fired()
        assert len(record.detail["pids"]) >= 2  # the agent, and the ranks that have begun
        wait_until(lambda: not any(alive(pid) for pid in record.detail["pids"]), "end of the node")
        assert job.wait() == 1
    assert "node1" in job.errors
    assert record.victim == 1
