"""`distrain train` on sequences that ranks share: every way of it, and what happens when planning fails."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from distrain.core.errors import ConfigError
from distrain.core.events import read_events
from distrain.core.load import load
from distrain.parallel import init
from distrain.train.hooks import Hook, StepReport
from distrain.train.loop import Trainer
from distrain.train.machine import Machine
from distrain.train.plan import layout_of
from distrain.train.prepare import check_all, prepare
from helpers.keeper_processes import kill_keepers
from helpers.ranks import run_ranks

CONFIG = """
run_dir = "{folder}/run"
seed = 5
[model]
num_layers = 2
d_model = 32
d_ffn = 48
[data]
source = "text"
path = "{folder}/corpus"
packing = "documents"
seq_len = 512
global_batch = 12
held_out = 0.2
[parallel]
sequence = "adaptive"
sequence_cost = "{folder}/cost.toml"
[optimizer]
lr = 1e-2
warmup_steps = 50
[train]
steps = 3
dtype = "float64"
eval_sequences = 12
[launch]
ranks = 4
device = "cpu"
"""

COST = """
alpha1 = 1e-5
alpha2 = 0.01
beta1 = 3.0
layers = 2
hidden = 32
tokens_per_gpu = 256

[bandwidth_gb_s]
2 = 0.5
4 = 0.2
"""


@pytest.fixture
def config(tmp_path: Path) -> Iterator[Path]:
    """Documents of 20 to 900 bytes, most of them short."""
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        words = " ".join(f"{number * i % 97} {'abcdefgh'[i % 8] * (i % 5)}" for i in range(200))
        (tmp_path / "corpus" / f"{number}.txt").write_text(
            words[: 20 + (number**3 % 907) * (number % 4) // 3]
        )
    (tmp_path / "cost.toml").write_text(COST)
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(folder=tmp_path))
    yield path
    kill_keepers(tmp_path)


def train(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    flags = [item if item.startswith("--") else f"--set={item}" for item in overrides]
    words = [sys.executable, "-m", "distrain", "train", str(config), *flags]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(config.parent)}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=150)


class Listen(Hook):
    """Keeps what the loop tells."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.validations: list[float] = []

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        self.reports.append(report)

    def on_validation(self, trainer: Trainer, *, step: int, loss: float) -> None:
        self.validations.append(loss)


def run_trainer(path: str, world_size: int, overrides: Sequence[str], listener: Listen) -> None:
    """Train in this process, a rank of ``world_size``."""
    run = load(path, overrides=overrides, environ={}, check=lambda run: check_all(run, world_size)).config
    plan = layout_of(run, world_size, cluster=Machine.of(run, world_size=world_size, here=True).cluster)
    Trainer(run, plan, init(plan, device="cpu"), hooks=[listener]).run()


def _reports(
    rank: int, world_size: int, path: str, overrides: Sequence[str]
) -> tuple[list[StepReport], list[float]]:
    listener = Listen()
    run_trainer(path, world_size, overrides, listener)
    return listener.reports, listener.validations


ALONE = ("parallel.sequence=none", "parallel.sequence_cost=")
STATIC = ("parallel.sequence_cost=", "parallel.micro_batches=3")
WAYS = {
    "adaptive": ("parallel.data=zero1",),
    "adaptive, pipeline": ("parallel.pp=2", "parallel.data=fsdp2"),
    "adaptive, interleaved": (
        "parallel.pp=2",
        "parallel.schedule=interleaved",
        "parallel.vpp=2",
        "model.num_layers=4",
        "parallel.sequence_cost={folder}/deep.toml",
    ),
    "adaptive, tensor": ("parallel.tp=2", "parallel.data=fsdp2"),
    "usp": (*STATIC, "parallel.sequence=usp", "parallel.sequence_degree=4", "parallel.sequence_ring=2"),
    "ring": (*STATIC, "parallel.sequence=ring", "parallel.sequence_degree=2", "parallel.tp=2"),
}


@pytest.mark.ranks
@pytest.mark.timeout(180)
@pytest.mark.parametrize("way", WAYS)
def test_shared_sequences_give_the_losses_of_one_process(config: Path, way: str) -> None:
    (config.parent / "deep.toml").write_text(COST.replace("layers = 2", "layers = 4"))
    overrides = [text.format(folder=config.parent) for text in WAYS[way]]
    layers = [text for text in overrides if "num_layers" in text]
    ((alone, validations),) = run_ranks(_reports, 1, str(config), [*ALONE, *layers])
    assert len(alone) == 3
    for reports, together in run_ranks(_reports, 4, str(config), overrides, timeout_s=100):
        assert together == pytest.approx(validations, rel=1e-10)
        for name in ("loss", "grad_norm", "num_tokens"):
            values, expected = ([getattr(report, name) for report in each] for each in (reports, alone))
            assert values == pytest.approx(expected, rel=1e-10), name
        first = reports[0].sequences  # later plans may be late, on a busy machine
        assert first is not None and first.note == ""
        if way == "adaptive":
            assert len(set(_sizes(first.groups))) > 1
        elif way in ("usp", "ring"):
            assert set(_sizes(first.groups)) == {4 if way == "usp" else 2}


def _sizes(groups: str) -> list[int]:
    words = [word for micro_batch in groups.split(" | ") for word in micro_batch.split("+")]
    return [int(word.split("x")[-1]) for word in words]


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_a_run_with_adaptive_groups_goes_on_where_it_was_and_tells_of_its_groups(config: Path) -> None:
    whole, _ = run_ranks(_reports, 4, str(config), ["train.steps=5"], timeout_s=100)[0]
    for steps in (2, 5):
        kill_keepers(config.parent)  # from the disk
        done = train(config, "checkpoint.every=1", f"train.steps={steps}")
        assert done.returncode == 0, done.stderr
    assert "resumed after step 2" in done.stdout
    assert re.search(r"step +5 .* groups [x+| \d]+, predicted \d+ ms, took [\d,]+ ms", done.stdout)
    events = list(read_events(config.parent / "run" / "events.jsonl"))
    losses = {event.step: event.value for event in events if event.name == "loss"}
    assert losses == pytest.approx({report.step: report.loss for report in whole}, rel=1e-10)
    told = {event.step: event.attributes for event in events if event.name == "sequences"}
    assert told.keys() == losses.keys()
    assert all(each["predicted_ms"] > 0 and each["measured_ms"] > 0 for each in told.values())


class Disturb(Listen):
    """Sends the planner process of this rank, and those that follow it, a signal after each step.

    A single one might meet a process that plans for validation, of which no step tells.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.num_sent = number, 0

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        super().on_step(trainer, report)
        for pid in _planners(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(pid, self.number)
                self.num_sent += 1


def _planners(parent: int) -> list[int]:
    """Planner processes that ``parent`` has started."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes()
            status = (folder / "status").read_text()
        except OSError:
            continue
        if b"planner_process" in words and f"PPid:\t{parent}\n" in status:
            found.append(int(folder.name))
    return found


def _disturbed(rank: int, world_size: int, path: str, number: int) -> tuple[list[float], list[str], int, int]:
    """Losses, notes, planner processes that got the signal, and those that are left at the end."""
    listener = Disturb(number)
    run_trainer(path, world_size, ["train.steps=12"], listener)
    notes = [report.sequences.note for report in listener.reports if report.sequences]
    losses = [report.loss for report in listener.reports]
    return losses, notes, listener.num_sent, len(_planners(os.getpid()))


@pytest.mark.ranks
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("number", "note"),
    [(signal.SIGKILL, "the planner process died"), (signal.SIGSTOP, "the planner was late")],
    ids=["killed", "stopped"],
)
def test_training_goes_on_without_its_planner_and_all_ranks_learn_why(
    config: Path, number: signal.Signals, note: str
) -> None:
    undisturbed = run_ranks(_disturbed, 2, str(config), 0, timeout_s=100)
    disturbed = run_ranks(_disturbed, 2, str(config), number, timeout_s=100)
    assert [sent > 0 for _, _, sent, _ in disturbed] == [True, False]
    for losses, notes, _, left in disturbed:
        assert any(said.startswith(note) for said in notes), notes
        assert notes == disturbed[0][1]
        assert losses == pytest.approx(undisturbed[0][0], rel=1e-10)
        assert left == 0


def test_everything_wrong_with_shared_sequences_is_said_at_once(config: Path) -> None:
    other = config.parent / "other.toml"
    other.write_text(COST.replace("hidden = 32", "hidden = 64").replace("= 256", "= 100"))
    done = train(
        config,
        f"parallel.sequence_cost={other}",
        "data.packing=fixed",
        "parallel.micro_batches=2",
        "parallel.sequence_degree=2",
        "parallel.sequence_ring=2",
    )
    assert done.returncode == 3
    for part in (
        "windows of one length leave nothing to adapt to",
        "parallel.micro_batches is not used by sequence = adaptive",
        "parallel.sequence_degree is not used",
        "parallel.sequence_ring is not used",
        "the cost model is that of another model",
        "the longest sequence does not fit the widest group",
    ):
        assert part in done.stderr, done.stderr
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["sequence=adaptive", "sequence_cost=9b"], "the cost model cannot be read"),
        (["sequence=adaptive", "sequence_cost="], "parallel.sequence_cost is missing"),
        (["sequence=ulysses", "sequence_cost=", "sequence_degree=3"], "does not divide dp into groups"),
        (
            ["sequence=usp", "sequence_cost=", "sequence_degree=4", "sequence_ring=3"],
            "sequence_ring does not",
        ),
        (["sequence=none"], "parallel.sequence_cost is not used by sequence = none"),
        (["auto=true"], "does not plan for shared sequences: their cost model is of one tp and pp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_way_of_sharing_that_cannot_be_is_refused(config: Path, overrides: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        load(
            config,
            overrides=[f"parallel.{item}" for item in overrides],
            environ={},
            check=lambda run: check_all(run, 4),
        )


def test_a_dry_run_shows_the_groups_and_counts_their_memory(config: Path) -> None:
    def kept(*overrides: str) -> int:
        run = load(config, overrides=overrides, environ={}).config
        return prepare(run, world_size=4, here=True).memory.ranks[0].activations_bytes

    # 12 sequences on 2 groups of 2, or on 1 of 4: a rank holds as many tokens, as it does without groups.
    static = ("parallel.sequence=ulysses", "parallel.sequence_cost=")
    each = [kept(*static, f"parallel.sequence_degree={degree}") for degree in (2, 4)]
    assert each == pytest.approx([kept(*ALONE)] * 2, rel=0.01)
    # One sequence alone on 4 ranks: a fourth of one on each.
    alone = kept(*static, "parallel.sequence_degree=4", "parallel.micro_batches=12")
    assert alone == pytest.approx(kept(*ALONE, "parallel.micro_batches=3") / 4, rel=0.01)
    done = train(config, "--dry-run")
    assert "sequence adaptive: groups of 1, 2, 4 of 4 slots" in done.stdout
    assert "256 tokens a rank" in done.stdout
    assert not (config.parent / "run").exists()


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_the_example_trains_as_it_says(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "distrain", "train", "examples/adaptive.toml"]
    small = (f"run_dir={tmp_path}", "train.steps=2", "data.seq_len=3000", "data.global_batch=4")
    words += [f"--set={item}" for item in (*small, "train.eval_sequences=4")]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "sequence adaptive: groups of 1, 2, 4 of 4 slots" in done.stdout
    assert len(re.findall(r"^step .* groups .*, predicted .* ms, took", done.stdout, flags=re.MULTILINE)) == 2
