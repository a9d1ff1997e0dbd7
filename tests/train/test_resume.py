"""Training that stops and goes on: in the same layout to the bit, in another one as far as float64 can tell."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distrain.checkpoint.locate import locate
from distrain.core.events import read_events
from helpers.keeper_processes import keepers_of, kill_keepers

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

CONFIG = """
run_dir = "{run}"
seed = 5
[data]
source = "text"
path = "{corpus}"
seq_len = 32
global_batch = 8
held_out = 0.2
[parallel]
micro_batches = 2
[optimizer]
lr = 1e-2
warmup_steps = 50
[train]
steps = 6
dtype = "float64"
eval_sequences = 8
[launch]
ranks = 4
device = "cpu"
"""

TP_PP = ("parallel.tp=2", "parallel.pp=2")
ZERO1 = ("parallel.data=zero1",)
TP_FSDP2 = ("parallel.tp=2", "parallel.data=fsdp2")
ZBV = ("model.num_layers=4", "parallel.pp=2", "parallel.schedule=zbv", "parallel.data=zero1")


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"{number}.txt").write_text(
            " ".join(f"{number * i % 97} {'abcdefgh'[i % 8] * (i % 5)}" for i in range(200))
        )
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(run=tmp_path / "run", corpus=corpus))
    yield path
    kill_keepers(tmp_path)


def start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "distrain", "train", str(config), *(f"--set={item}" for item in overrides)]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(config.parent)}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train(config: Path, *overrides: str) -> str:
    job = start(config, *overrides)
    output, errors = job.communicate(timeout=100)
    assert job.returncode == 0, errors
    return output + errors


def losses(config: Path) -> dict[int, float]:
    """The last loss reported of each step."""
    events = read_events(config.parent / "run" / "events.jsonl")
    return {
        e.step: e.value for e in events if e.name == "loss" and e.step is not None and e.value is not None
    }


def eventually(condition: Callable[[], bool], *, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def test_a_run_goes_on_under_other_layouts(config: Path) -> None:
    """tp x pp, then ZeRO-1, then tp x FSDP2: one curve. Every tensor is cut otherwise each time.

    The second goes on from the near one of two levels of storage, a disk of the node, the third from the far one.
    """
    train(config, *TP_PP)
    whole = losses(config)
    (config.parent / "run" / "events.jsonl").unlink()
    near, far = config.parent / "near-0", config.parent / "far"
    tiers = [
        {"url": f"{config.parent}/near-{{node}}", "shared": False, "keep_last": 1},
        {"url": f"file://{far}", "every": 100},
    ]
    saving = ("checkpoint.every=1", f"checkpoint.tiers={json.dumps(tiers)}")
    for steps, layout in ((2, TP_PP), (4, ZERO1), (6, TP_FSDP2)):
        kill_keepers(config.parent)  # from the disk
        if steps > 2:
            shutil.rmtree(far if steps == 4 else near)
        output = train(config, *saving, f"train.steps={steps}", *layout)
        assert steps == 2 or f"resumed after step {steps - 2}" in output
        assert (near / f"step-{steps:08}").is_dir()
    assert {path.name for path in far.glob("step-*")} >= {"step-00000004", "step-00000006"}
    assert losses(config) == pytest.approx(whole, rel=1e-9)


def test_after_a_kill_of_every_rank_the_memory_has_the_last_step(config: Path) -> None:
    whole_run = ("train.steps=8", *ZBV)
    train(config, *whole_run)
    whole = losses(config)
    events = config.parent / "run" / "events.jsonl"
    events.unlink()
    saving = ("checkpoint.every=1", "checkpoint.disk_every=1000")
    job = start(config, *saving, "train.steps=100000", *ZBV)
    try:
        assert eventually(lambda: events.exists() and len(losses(config)) >= 4, within_s=120)
    finally:
        job.send_signal(signal.SIGKILL)  # the ranks die with their launcher
        job.communicate()
    assert keepers_of(config.parent)
    done = max(losses(config))
    output = train(config, *saving, f"train.steps={done + 2}", *ZBV)
    resumed = int(output.split("resumed after step ")[1].split()[0])
    assert resumed >= done - 1  # at most the step whose copy was not over
    after = losses(config)
    assert all(after[step] == whole[step] for step in whole if step in after)
    assert not list((config.parent / "run" / "checkpoints").glob(f"step-*{resumed}"))


def test_a_job_that_is_asked_to_stop_saves_its_last_step_first(config: Path) -> None:
    saving = ("checkpoint.every=1000", *TP_PP)
    events = config.parent / "run" / "events.jsonl"
    job = start(config, *saving, "train.steps=100000")
    try:
        assert eventually(lambda: events.exists() and len(losses(config)) >= 3, within_s=120)
        job.send_signal(signal.SIGTERM)
        output, errors = job.communicate(timeout=150)
    finally:
        job.kill()
        job.wait()
    assert job.returncode == 128 + signal.SIGTERM, errors
    done = max(losses(config))
    assert f"stopped after step {done} as asked" in output
    assert locate(config.parent / "run" / "checkpoints").manifest.step == done
    kill_keepers(config.parent)
    assert f"resumed after step {done}" in train(config, *saving, f"train.steps={done + 1}")
