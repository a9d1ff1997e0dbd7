"""``distrain drill`` on real jobs: a trainer, and a script that knows of nothing, are broken, come back, are scored."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distrain.faults.inject import FaultPlan, JobShape
from distrain.faults.inject.capabilities import HINTS, Capabilities, probe
from helpers.keeper_processes import keepers_of, kill_keepers
from helpers.runs import write_run
from helpers.victims import left_groups, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

SCRIPT = """
import sys
import torch
import torch.distributed as dist
import distrain

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters(), lr=float(sys.argv[1]))
run = distrain.attach("mine", every=2, device="cpu", model=model, optimizer=optimizer)
for step in range(run.restore(), 6):
    optimizer.zero_grad()
    loss = model(torch.full((2, 4), step + 1.0)).square().mean()
    loss.backward()
    for param in model.parameters():
        dist.all_reduce(param.grad)
    optimizer.step()
    run.step(step + 1, loss=loss.item(), seconds=0.01)
run.close()
dist.destroy_process_group()
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_run(tmp_path, steps=8, every=2)


def drill(folder: Path, plan: FaultPlan, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, score and stderr of a drill, whose keepers live in a folder of their own and must be gone."""
    path = folder / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    options = ["--json", "--out", str(folder / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "distrain", "drill", str(path), *options, *words],
        env=os.environ | {"XDG_RUNTIME_DIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    left = keepers_of(folder)
    kill_keepers(folder)
    assert not left, "a keeper is left behind"
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def test_a_killed_trainer_comes_back_bit_for_bit(config: Path, tmp_path: Path) -> None:
    plan = FaultPlan().kill(ranks=[1]).at(step=5).expect("crash", suspects=[1], within_s=30.0)
    code, score, errors = drill(tmp_path, plan, str(config))
    assert code == 0, errors
    (row,) = score["faults"]
    assert (row["detected"], row["suspects"], row["source"]) == ("crash", [1], "launcher")
    assert row["step"] == 5 and row["detect_s"] < row["recover_s"]
    assert score["num_launches"] == 2 and score["is_equal"] is True
    assert score["steps_lost"] <= 4  # step 4 is in memory, at worst step 2
    assert 0 < score["goodput"] < 1


def test_a_fault_that_changes_numbers_is_seen_in_the_final_state_and_missed_by_all(
    config: Path, tmp_path: Path
) -> None:
    plan = FaultPlan().inject("numeric.zero", ranks=[0]).at(step=3).expect("numeric")
    code, score, _ = drill(tmp_path, plan, str(config))
    assert code == 1 and score["is_equal"] is False
    assert score["problems"] == ["fault 0 (numeric.zero) on 0: nobody noticed; expected numeric"]


def test_a_fault_that_never_fires_fails_the_drill(config: Path, tmp_path: Path) -> None:
    """And the levels of storage of the run, where its real checkpoints are, are left alone."""
    plan = FaultPlan().inject("comm.delay", ranks=[0]).at(step=8, op=100_000)
    with config.open("a") as file:
        file.write(f'[[checkpoint.tiers]]\nurl = "{tmp_path}/real"\n')
    code, score, _ = drill(tmp_path, plan, str(config), "--no-reference")
    assert code == 1 and score["is_equal"] is None
    assert not (tmp_path / "real").exists() and any((tmp_path / "out/faulty/checkpoints").glob("step-*"))
    assert score["problems"] == ["fault 0 (comm.delay) on 0: it did not fire"]


def test_a_script_that_knows_of_nothing_is_killed_in_its_step_and_resumes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    plan = FaultPlan().kill(ranks=[0]).at(step=4).expect("crash", suspects=[0])
    code, score, errors = drill(tmp_path, plan, str(script), "--ranks", "2", "--", "0.1")
    assert code == 0, errors
    assert [row["step"] for row in score["faults"]] == [4]
    assert score["num_launches"] == 2 and score["is_equal"] is True


def test_words_that_would_do_nothing_are_refused_all_at_once(config: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "sound").mkdir(parents=True)
    words = ["--ranks", "3", "--emulate-nodes", "4", "--", "0.1"]
    code, _, errors = drill(tmp_path, FaultPlan().kill(ranks=[1]).at(step=5), str(config), *words)
    assert code == 3 and not (tmp_path / "out" / "truth").exists()
    for problem in (
        "--ranks is not",
        "after -- is not",
        "spread over",
        "a drill in this",
    ):
        assert problem in errors


def test_a_job_that_fails_by_itself_is_not_drilled(config: Path, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(4)")
    code, _, errors = drill(tmp_path, FaultPlan().kill(ranks=[0]), str(script))
    assert code not in (0, 3) and "the job fails without any fault" in errors and "Traceback" not in errors
    assert not (tmp_path / "out" / "truth").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_drill_that_is_stopped_leaves_nothing_behind(config: Path, tmp_path: Path, signum: int) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(
        json.dumps(FaultPlan().inject("data.stall", ranks=[0]).at(step=3).lasting(60.0).to_json())
    )
    words = ["drill", str(plan), str(config), "--no-reference", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "distrain", *words],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_until(lambda: any((tmp_path / "out").glob("truth/rank-0.jsonl")), "a rank that is armed")
        wait_until(lambda: (tmp_path / "out/truth/rank-0.jsonl").stat().st_size > 0, "a fault that has fired")
        process.send_signal(signum)
        assert process.wait(90) == 128 + signum
    wait_until(lambda: not processes_of(tmp_path), f"the end of {processes_of(tmp_path)}")


def test_a_drill_that_is_killed_takes_its_job_with_it(config: Path, tmp_path: Path) -> None:
    """One of its ranks is frozen: no signal reaches it, until somebody takes its group away."""
    if missing := probe().lacks("freezer"):
        pytest.skip(missing)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(FaultPlan().inject("cgroup.freeze", ranks=[0]).at(step=3).to_json()))
    words = ["drill", str(plan), str(config), "--no-reference", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "distrain", *words],
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        fired = tmp_path / "out" / "truth" / f"injector-{process.pid}.jsonl"
        wait_until(lambda: fired.exists() and fired.stat().st_size > 0, "a fault that has fired")
        wait_until(lambda: left_groups(process.pid), "a frozen rank")
        process.kill()
        process.wait()
    wait_until(lambda: not processes_of(tmp_path), f"the end of {processes_of(tmp_path)}")
    assert not left_groups(process.pid)


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that were started with this runtime folder."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"XDG_RUNTIME_DIR={folder}".encode() in (each / "environ").read_bytes().split(b"\0"):
                found.append((each / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if line]


def test_a_plan_that_cannot_be_is_refused_before_anything_starts(config: Path, tmp_path: Path) -> None:
    plan = FaultPlan().kill(ranks=[7]).at(step=99).inject("gpu.xid_sim", ranks=[0])
    plan = plan.inject("net.loss", link=(0, 1))
    code, _, errors = drill(tmp_path, plan, str(config))
    assert code == 3 and not (tmp_path / "out").exists()
    assert "ranks that there are not" in errors and "cannot be injected yet" in errors
    assert "has nothing to hit" in errors and "--netns" in errors


def test_what_is_wrong_with_file_and_plan_and_job_comes_in_one_message(config: Path, tmp_path: Path) -> None:
    plan, empty = tmp_path / "plan.toml", tmp_path / "empty.toml"
    plan.write_text(
        "[[faults]]\nkind = 'proc.sigkil'\n[[faults]]\nkind = 'proc.exit'\ntarget = { ranks = [9] }\n"
    )
    empty.write_text("seed = 7\n")

    def refused(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "distrain", "drill", *words, "--out", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 3 and not (tmp_path / "out").exists()
        return done.stderr

    both = refused(str(plan), str(config))
    assert 'kind = "proc.sigkill"' in both and "ranks that there are not" in both
    without_job = refused(str(plan), str(tmp_path / "none.py"))
    assert "no such script" in without_job and 'kind = "proc.sigkill"' in without_job
    assert "the plan has no fault" in refused(str(empty), str(config))


PLANS = sorted((Path(__file__).resolve().parents[2] / "examples/drills").glob("*.toml"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_every_plan_of_the_library_can_be_carried_out_on_the_example_of_four_ranks(plan: Path) -> None:
    """Those that need networks say how to get them."""
    is_apart = "--emulate-nodes 2 --netns" in plan.read_text()
    job = JobShape(world_size=4, num_nodes=2 if is_apart else 1, steps=12, has_network=is_apart)
    everything = Capabilities(dict.fromkeys(HINTS, "here"))
    assert FaultPlan.load(plan, job=job, capabilities=everything).faults


def test_a_lost_node_is_noticed_by_the_launcher(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    plan = FaultPlan().kill(node=1).at(step=4).expect("crash", suspects=[1], within_s=60.0)
    words = ["--ranks", "2", "--emulate-nodes", "2", "--no-reference", "--", "0.1"]
    code, score, errors = drill(tmp_path, plan, str(script), *words)
    assert code == 0, errors
    (row,) = score["faults"]
    assert (row["detected"], row["suspects"], row["source"]) == ("crash", [1], "launcher")
    assert score["num_launches"] == 2
