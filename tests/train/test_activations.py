"""``[activations]`` in training: every mode gives the losses of none to the bit, and says what it did."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from distrain.core.errors import ConfigError, InfeasibleError
from distrain.core.load import load
from distrain.core.vocabulary import GIB, Activations, ClusterSpec, DeviceSpec
from distrain.parallel import init
from distrain.planners.activation_policy import choose
from distrain.planners.memory import estimate
from distrain.train.activation_task import task_of
from distrain.train.activations import plan_of
from distrain.train.hooks import Hook, StepReport
from distrain.train.loop import Trainer
from distrain.train.machine import Machine
from distrain.train.plan import layout_of
from distrain.train.prepare import prepare
from helpers.ranks import run_ranks

CONFIG = """
run_dir = "{folder}/run"
seed = 5
[model]
num_layers = 6
d_model = 32
d_ffn = 48
[data]
seq_len = 256
global_batch = 4
[optimizer]
lr = 1e-2
warmup_steps = 1
[train]
steps = 3
eval_sequences = 4
[launch]
device = "cpu"
"""


class Seen(Hook):
    """Keeps every report."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.validation: list[float] = []

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        self.reports.append(report)

    def on_validation(self, trainer: Trainer, *, step: int, loss: float) -> None:
        self.validation.append(loss)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "cost.toml").write_text(COST)
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(folder=tmp_path))
    return path


def train(
    rank: int, world_size: int, path: Path, overrides: Sequence[str]
) -> tuple[list[StepReport], list[float], list[str]]:
    """On one rank of some: reports, validation losses, the layout in words."""
    config = load(path, overrides=list(overrides), environ={}).config
    plan = layout_of(config, world_size, cluster=Machine.of(config, world_size=world_size, here=True).cluster)
    parallel = init(plan, device="cpu")
    seen = Seen()
    trainer = Trainer(config, plan, parallel, hooks=[seen])
    trainer.run()
    return seen.reports, seen.validation, trainer.describe()


MODES = {
    "recompute": ("activations.mode=recompute",),
    "swap": ("activations.mode=swap", "activations.host_gib=1"),
    "memo": ("activations.mode=memo", "activations.alpha=0.5", "activations.host_gib=1"),
}
COST = """
alpha1 = 1e-5
alpha2 = 0.01
beta1 = 1.0
layers = 6
hidden = 32
tokens_per_gpu = 256
bandwidth_gb_s = { 2 = 0.5 }
"""
ADAPTIVE = (
    "launch.ranks=2",
    "data.packing=documents",
    "data.seq_len=512",
    "parallel.sequence=adaptive",
    "parallel.sequence_cost={folder}/cost.toml",
)
LAYOUTS = {
    "one rank": ("launch.ranks=1",),
    "tp 2": ("launch.ranks=2", "parallel.tp=2"),
    "pp 2": ("launch.ranks=2", "parallel.pp=2", "parallel.micro_batches=4"),
    "fsdp2": ("launch.ranks=2", "parallel.data=fsdp2"),
    "adaptive": ADAPTIVE,
    "ulysses": ("launch.ranks=2", "parallel.sequence=ulysses", "parallel.sequence_degree=2"),
}


CASES = [
    *(("one rank", mode) for mode in MODES),
    *((layout, "memo") for layout in LAYOUTS if layout != "one rank"),
]


@pytest.mark.ranks
@pytest.mark.parametrize(("layout", "mode"), CASES)
def test_a_managed_run_trains_to_the_bit_as_an_unmanaged_one(config: Path, layout: str, mode: str) -> None:
    ranks = int(LAYOUTS[layout][0].partition("=")[2])
    layout_overrides = [each.format(folder=config.parent) for each in LAYOUTS[layout]]
    plain = run_ranks(train, ranks, config, layout_overrides)
    managed = run_ranks(train, ranks, config, [*layout_overrides, *MODES[mode]])
    for (expected, validated, _), (found, validated_too, words) in zip(plain, managed, strict=True):
        # Two adaptive runs may follow different plans, if the machine is busy: then roundings differ.
        alike = (lambda values: pytest.approx(values, rel=1e-5)) if layout == "adaptive" else list
        assert [each.loss for each in found] == alike([each.loss for each in expected])
        assert [each.grad_norm for each in found] == alike([each.grad_norm for each in expected])
        assert validated_too == alike(validated)
        assert any(line.startswith(f"memory   {mode}") for line in words)
        report = found[-1].activations
        assert report is not None
        assert report.host_bytes == 0
        assert (report.recomputed_bytes > 0) == (mode != "swap")
        assert (report.swapped_bytes > 0) == (mode != "recompute")
        assert expected[-1].activations is None


@pytest.mark.ranks
def test_auto_keeps_what_fits(config: Path) -> None:
    ((reports, _, words),) = run_ranks(train, 1, config, ("activations.mode=auto", "launch.ranks=1"))
    assert reports[-1].activations is not None
    assert reports[-1].activations.recomputed_bytes == 0
    assert any("auto: kept 100%" in line for line in words)


SMALL = ClusterSpec(
    num_nodes=1,
    devices_per_node=1,
    device=DeviceSpec(name="h100-80g", memory_bytes=80 * GIB, peak_flops=989e12),
    host_memory_bytes=512 * GIB,
)


def test_auto_swaps_and_recomputes_what_does_not_fit_and_refuses_what_fits_nowhere(config: Path) -> None:
    run = load(
        config,
        overrides=[
            "model.preset=1.3b",
            "model.num_layers=24",
            "model.d_model=2048",
            "model.d_ffn=5504",
            "data.seq_len=65536",
            "data.global_batch=1",
            "train.dtype=bfloat16",
            "activations.mode=auto",
        ],
        environ={},
    ).config
    plan = layout_of(run, 1, cluster=SMALL)
    task = task_of(
        run, plan, SMALL, sequences=None, layers=24, pp_rank=0, host_bytes=64 * GIB, link_bytes_s=25e9
    )
    assert task.num_layers * task.layer_bytes > 2 * task.device_bytes  # it cannot all stay
    choice = choose(task)
    made = plan_of(task, choice)
    assert choice.replay.device_bytes <= task.device_bytes
    assert choice.replay.host_bytes <= 64 * GIB
    assert any(layer.recomputes for layer in made.layers)
    assert any(split.swap for layer in made.layers for split in layer.splits)
    with pytest.raises(InfeasibleError):
        choose(
            task_of(run, plan, SMALL, sequences=None, layers=24, pp_rank=0, host_bytes=0.0, link_bytes_s=25e9)
        )


def test_the_memory_of_a_layout_falls_with_every_mode(config: Path) -> None:
    run = load(config, environ={}).config
    cluster = Machine.of(run, world_size=1, here=True).cluster
    peaks = {
        mode: estimate(
            run.model.shape(), layout_of(run, 1, cluster=cluster).degrees, schedule=run.parallel.schedule,
            data=run.parallel.data, micro_batch_size=4, seq_len=256, micro_batches=1, dtype="float32",
            optimizer="adamw", cluster=cluster, activations=mode,
        ).peak_bytes
        for mode in Activations
    }  # fmt: skip
    assert peaks[Activations.RECOMPUTE] < peaks[Activations.NONE]
    assert peaks[Activations.SWAP] < peaks[Activations.NONE]
    assert peaks[Activations.AUTO] == min(peaks.values())


def test_values_that_a_mode_does_not_use_are_refused_with_all_others(config: Path) -> None:
    wrong = ["activations.alpha=0.5", "activations.host_gib=3", "activations.link_gb_s=9"]
    with pytest.raises(ConfigError) as refused:
        prepare(load(config, overrides=wrong, environ={}).config, world_size=1, here=True)
    assert [problem.error for problem in refused.value.problems] == [
        f"activations.{name} is not used by mode = none" for name in ("alpha", "host_gib", "link_gb_s")
    ]
