"""`distrain train` from end to end: real processes, real data, real interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from distrain.checkpoint.convert import convert
from distrain.core.config import RunConfig
from distrain.core.events import read_events
from distrain.core.load import load
from distrain.core.vocabulary import ModelShape
from distrain.train.data.batches import BatchStream
from distrain.train.data.corpus import open_corpus
from distrain.train.model import Decoder
from distrain.train.prepare import check_all
from distrain.train.weights import materialize
from helpers.checkpoints import whole, write_checkpoint

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]  # a guard, not a measure: machines may be busy

CONFIG = """
seed = 5
[model]
preset = "tiny"
num_layers = 4
[data]
source = "text"
seq_len = 32
global_batch = 8
held_out = 0.2
[parallel]
micro_batches = 2
[optimizer]
lr = 1e-2
warmup_steps = 2
[train]
steps = 4
eval_sequences = 8
[launch]
ranks = 1
device = "cpu"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run on a small corpus of this project's own making, in a folder of its own."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(12):
        words = " ".join(
            f"{number * index % 97} {'abcdefgh'[index % 8] * (index % 5)}"
            for index in range(20 + 40 * number)
        )
        (corpus / f"{number}.txt").write_text(words)
    path = tmp_path / "run.toml"
    path.write_text(
        f'run_dir = "{tmp_path / "run"}"\n' + CONFIG.replace("[data]", f'[data]\npath = "{corpus}"')
    )
    return path


def command(config: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "distrain", "train", str(config), *(f"--set={item}" for item in overrides)]


def train(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, *overrides), capture_output=True, text=True, timeout=150)


def scalars(config: Path, name: str) -> list[float]:
    events = read_events(config.parent / "run" / "events.jsonl")
    return [
        event.value
        for event in events
        if event.kind == "scalar" and event.name == name and event.value is not None
    ]


def eventually(condition: Callable[[], bool], *, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


LAYOUTS = {
    "tp2-pp2": ("launch.ranks=4", "parallel.tp=2", "parallel.pp=2"),
    "pp2-dp2-interleaved-zero1": (
        "launch.ranks=4",
        "parallel.pp=2",
        "parallel.schedule=interleaved",
        "parallel.vpp=2",
        "parallel.data=zero1",
    ),
    "dp4-fsdp2": ("launch.ranks=4", "parallel.data=fsdp2"),
    "tp2-pp2-dp2-zbv": (
        "launch.ranks=8",
        "parallel.tp=2",
        "parallel.pp=2",
        "parallel.schedule=zbv",
        "model.num_layers=4",
        "data.global_batch=8",
    ),
}


@pytest.mark.parametrize(
    ("packing", "layouts"),
    [("fixed", ("tp2-pp2", "dp4-fsdp2")), ("documents", ("pp2-dp2-interleaved-zero1", "tp2-pp2-dp2-zbv"))],
)
def test_every_layout_reports_the_losses_of_one_process(
    config: Path, packing: str, layouts: tuple[str, ...]
) -> None:
    """Documents make micro-batches whose shapes differ."""
    runs = []
    for overrides in ((), *(LAYOUTS[layout] for layout in layouts)):
        done = train(config, "train.dtype=float64", f"data.packing={packing}", *overrides)
        assert done.returncode == 0, done.stderr
        runs.append({name: scalars(config, name) for name in ("loss", "grad_norm", "validation_loss")})
        (config.parent / "run" / "events.jsonl").unlink()
    alone = runs[0]
    assert len(alone["loss"]) == 4
    assert len(alone["validation_loss"]) == 1
    for together in runs[1:]:
        for name, values in alone.items():
            assert together[name] == pytest.approx(values, rel=1e-10), name


def test_validation_is_the_mean_loss_of_held_out_sequences(config: Path) -> None:
    """Beside a rate that changes nothing, it is what the initial model makes of the held-out documents."""
    done = train(
        config, "train.steps=1", "optimizer.lr=1e-30", "train.dtype=float64", "data.packing=documents"
    )
    assert done.returncode == 0, done.stderr
    run = load(config.parent / "run" / "config.json").config
    model = drawn(run.model.shape(), seed=run.seed)
    assert scalars(config, "validation_loss") == [pytest.approx(held_out_loss(model, run), rel=1e-10)]


def test_training_starts_from_a_model_in_hugging_faces_layout(config: Path) -> None:
    """Of which every rank cuts out its part; a model of another kind is refused with all that differs."""
    shape = replace(load(config).config.model.shape(), norm_eps=1e-3)
    model, folder = drawn(shape, seed=6), config.parent / "llama"
    tensors = model.state_dict().items()
    shards = [whole(f"model.{name}", "float64", tensor.numpy()) for name, tensor in tensors]
    convert(write_checkpoint(config.parent / "ours", [shards]), folder, to="hf", shape=shape)
    start = ("optimizer.lr=1e-30", "train.steps=1", "train.dtype=float64", "data.packing=documents")
    weights = f"model.weights={folder}"
    done = train(config, *start, "launch.ranks=2", "parallel.tp=2", weights, "model.norm_eps=1e-3")
    assert done.returncode == 0, done.stderr
    run = load(config.parent / "run" / "config.json").config
    assert scalars(config, "validation_loss") == [pytest.approx(held_out_loss(model, run), rel=1e-10)]
    other = load(config, overrides=[weights, "model.d_ffn=64"]).config
    hints = [problem.hint for problem in check_all(other, 1)]
    assert hints == [f"--set model.d_ffn={shape.d_ffn}", "--set model.norm_eps=0.001"]
    (nothing,) = check_all(load(config, overrides=[f"model.weights={config.parent}"]).config, 1)
    assert "no Llama model" in nothing.error


def drawn(shape: ModelShape, *, seed: int) -> Decoder:
    """A model in one piece, as a run draws it."""
    with torch.device("meta"):
        model = Decoder(shape).double()
    materialize(model, device=torch.device("cpu"), seed=seed, num_layers=shape.num_layers)
    return model


def held_out_loss(model: Decoder, run: RunConfig) -> float:
    """What the model makes of the held-out documents of a run, in nats a token."""
    corpus = open_corpus(run.data, vocab_size=run.model.shape().vocab_size)
    stream = BatchStream(
        corpus, packing="documents", seq_len=32, global_batch=8, seed=run.seed, split="held_out"
    )
    sequences = stream.fetch(stream.peek().ids)
    with torch.no_grad():
        losses = [
            F.cross_entropy(
                model(torch.from_numpy(ids[:-1])[None])[0], torch.from_numpy(ids[1:]), reduction="sum"
            ).item()
            for ids in sequences
        ]
    return sum(losses) / sum(len(ids) - 1 for ids in sequences)


def test_a_run_says_what_it_does_and_learns(config: Path) -> None:
    done = train(config, "launch.ranks=2", "parallel.pp=2", "train.steps=30", "train.log_every=10")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("layout   2 ranks = tp 1 x pp 2 x dp 1") for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("step") and "tokens/s" in line] == [
        "1",
        "10",
        "20",
        "30",
    ]
    assert lines[-1].startswith("done: loss")
    losses = scalars(config, "loss")
    assert len(losses) == 30
    assert losses[0] > 5 > 4 > losses[-1]
    assert "\x1b" not in done.stdout  # plain lines where there is no terminal


def test_bfloat16_and_lamb_learn_too(config: Path) -> None:
    done = train(config, "launch.ranks=2", "train.dtype=bfloat16", "optimizer.name=lamb", "train.steps=20")
    assert done.returncode == 0, done.stderr
    losses = scalars(config, "loss")
    assert losses[-1] < losses[0] - 1


def test_auto_chooses_a_layout_and_records_it(config: Path) -> None:
    text = config.read_text().replace("[parallel]\nmicro_batches = 2\n", "")
    config.write_text('parallel = "auto"\n' + text)
    done = train(config, "launch.ranks=2", "train.steps=2")
    assert done.returncode == 0, done.stderr
    plan = json.loads((config.parent / "run" / "plan.json").read_text())
    degrees = plan["degrees"]
    assert degrees["tp"] * degrees["pp"] * degrees["dp"] == 2
    assert plan["reasons"]


def test_torchrun_can_start_the_trainer(config: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "distrain.train",
    ]
    done = subprocess.run(
        [*torchrun, str(config), "parallel.tp=2", "train.steps=2"],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert len(scalars(config, "loss")) == 2


def test_a_dry_run_starts_nothing_and_leaves_nothing(config: Path) -> None:
    args = command(
        config,
        "model.preset=65b",
        "model.num_layers=80",
        "parallel.tp=8",
        "parallel.pp=8",
        "data.seq_len=4096",
    )
    overrides = [
        "data.global_batch=1024",
        "parallel.micro_batches=64",
        "parallel.data=fsdp2",
        "launch.device=cuda",
    ]
    args += [f"--set={item}" for item in overrides] + ["--dry-run", "--world-size", "1024"]
    done = subprocess.run([*args, "--json"], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["num_params"] == 65_285_660_672
    assert answer["plan"]["degrees"]["dp"] == 16
    assert sum(answer["stage_params"]) == answer["num_params"]
    assert 0 < answer["memory"]["ranks"][0]["parameters_bytes"] < answer["memory"]["device_limit_bytes"]
    assert not (config.parent / "run").exists()
    words = subprocess.run(args, capture_output=True, text=True, timeout=150).stdout
    assert "tp 8 x pp 8 x dp 16" in words
    assert "GiB" in words


def test_what_does_not_fit_is_refused_with_numbers(config: Path) -> None:
    args = command(
        config, "model.preset=175b", "model.num_layers=96", "launch.device=cuda", "data.global_batch=16"
    )
    done = subprocess.run(
        [*args, "--dry-run", "--world-size", "8"], capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 3
    assert "does not fit the device's memory" in done.stderr
    assert "GiB" in done.stderr


def test_all_problems_come_at_once_and_nothing_starts(config: Path) -> None:
    done = train(
        config,
        "parallel.tp=3",
        "optimizer.lr=-1",
        "train.stepz=5",
        "data.path=/nowhere/at/all",
        "launch.ranks=4",
    )
    assert done.returncode == 3
    for part in ("stepz", "optimizer.lr", "tp = 3", "/nowhere/at/all"):
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (config.parent / "run").exists()


def workers(config: Path) -> dict[int, int]:
    """Rank to process id of the running workers of this config."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"distrain.train" in words and str(config.parent / "run").encode() in b" ".join(words):
                environment = dict(
                    item.partition(b"=")[::2] for item in (folder / "environ").read_bytes().split(b"\0")
                )
                found[int(environment[b"RANK"])] = int(folder.name)
        except (OSError, KeyError):
            continue
    return found


@pytest.fixture
def running(config: Path) -> Iterator[subprocess.Popen[str]]:
    """Four ranks (tp 2 x pp 2) that have taken their first steps and would take many more."""
    overrides = ("launch.ranks=4", "parallel.tp=2", "parallel.pp=2", "train.steps=100000")
    job = subprocess.Popen(
        command(config, *overrides), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        events = config.parent / "run" / "events.jsonl"
        assert eventually(lambda: events.exists() and len(scalars(config, "loss")) >= 2, within_s=120)
        yield job
    finally:
        job.kill()
        job.communicate()
        assert eventually(lambda: not workers(config), within_s=10)


@pytest.mark.parametrize("victim", [0, 3])
def test_the_death_of_a_rank_ends_the_job_and_is_named(
    config: Path, running: subprocess.Popen[str], victim: int
) -> None:
    os.kill(workers(config)[victim], signal.SIGKILL)
    _, errors = running.communicate(timeout=150)
    assert running.returncode == 1
    assert f"rank {victim} failed first: SIGKILL" in errors
    assert not workers(config)


def test_a_stopped_rank_does_not_keep_an_interrupted_job(
    config: Path, running: subprocess.Popen[str]
) -> None:
    os.kill(workers(config)[2], signal.SIGSTOP)
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=150)
    assert running.returncode == 130
    assert not workers(config)


def test_an_interrupt_ends_quietly(config: Path, running: subprocess.Popen[str]) -> None:
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=150)
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert not workers(config)
