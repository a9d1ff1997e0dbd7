"""Managed layers under tensor, pipeline, data and sequence parallelism: every gradient and weight to the bit."""

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distrain.activation.manager import ActivationManager
from distrain.core.config import OptimizerConfig
from distrain.core.errors import ConfigError
from distrain.core.vocabulary import DataParallel, Degrees, ModelShape, Schedule
from distrain.parallel import MicroBatch, Parallel, init
from distrain.parallel.sequence.attention import SequenceAttention
from distrain.parallel.sequence.layout import SequenceLayout
from distrain.parallel.tensor import loss_context
from distrain.planners.activation_plan import ActivationPlan, LayerPlan, Split, snap, uniform
from distrain.train.assembly import Assembly, assemble
from distrain.train.model import Block, Rotary
from distrain.train.optim import build_optimizer
from helpers.parity import whole
from helpers.ranks import run_ranks

SHAPE = ModelShape(d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, d_ffn=48, vocab_size=64)
NUM_TOKENS = 640
MODES = ("recompute", "swap", "memo-0.3", "mixed")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A layout; ``num_steps`` optimizer steps of micro-batches of one sequence."""

    degrees: Degrees
    schedule: Schedule = Schedule.ONE_F_ONE_B
    data: DataParallel = DataParallel.DDP
    num_micro_batches: int = 2
    autocast: bool = False
    num_steps: int = 2

    def __str__(self) -> str:
        d = self.degrees
        return f"tp{d.tp}-pp{d.pp}-dp{d.dp}-{self.schedule}-{self.data}" + ("-bf16" if self.autocast else "")


def plan_of(mode: str, num_layers: int, num_tokens: int) -> ActivationPlan:
    """One plan for all layers; ``mixed`` has another alpha for each and keeps some tokens."""
    if mode == "mixed":
        layers = [
            LayerPlan.of(snap(num_tokens, keep=0.25 * (i % 2), swap=(i + 1) / 8)) for i in range(num_layers)
        ]
        return ActivationPlan(layers=tuple(layers))
    name, _, alpha = mode.partition("-")
    plan = uniform(
        name, num_layers=1 if name == "recompute" else 3, num_tokens=num_tokens, alpha=float(alpha or 1)
    )
    return ActivationPlan(layers=plan.layers[:1] * num_layers)


def compare(rank: int, world_size: int, case: Case) -> dict[str, dict[str, int]]:
    """What the manager did in each mode, after checking that it changed nothing."""
    parallel = init(case.degrees, device="cpu")
    true_losses, true_weights, _ = train(parallel, case, "")
    done = {}
    for mode in MODES:
        losses, weights, done[mode] = train(parallel, case, mode)
        assert losses == true_losses, mode
        for name, array in true_weights.items():
            np.testing.assert_array_equal(weights[name], array, err_msg=f"{mode} {name}")
    return done


def train(parallel: Parallel, case: Case, mode: str) -> tuple[list[float], Arrays, dict[str, int]]:
    """Losses, weights after the last step, and what the manager did."""
    assembly = assemble(
        SHAPE,
        parallel,
        schedule=case.schedule,
        data=case.data,
        micro_batches=case.num_micro_batches,
        seed=3,
    )
    layers = [layer for module in assembly.modules.values() for layer in module.layers.values()]
    if not mode:
        return steps(assembly, parallel, case), whole(assembly), {}
    groups = [parallel.groups.axis("tp")] if case.degrees.tp > 1 else []
    plan = plan_of(mode, len(layers), NUM_TOKENS // case.degrees.tp)
    with ActivationManager(layers, plan, groups=groups) as manager:
        assembly.runtime.add_hook(manager)
        losses = steps(assembly, parallel, case)
    report = manager.report()
    assert report.as_planned and report.host_bytes == 0, report
    counts = ("num_replays", "num_fetched_ahead", "swapped_bytes", "recomputed_bytes")
    return losses, whole(assembly), {name: getattr(report, name) for name in counts}


def steps(assembly: Assembly, parallel: Parallel, case: Case) -> list[float]:
    """Train a few steps."""
    data = assembly.data
    group = parallel.groups.axis("model")
    optimizer = build_optimizer(data.shards, OptimizerConfig(lr=1e-2), names=assembly.names, group=group)
    losses = []
    for step in range(case.num_steps):
        generator = torch.Generator().manual_seed(step + 10 * parallel.coordinates["dp"])
        ids = torch.randint(
            0, SHAPE.vocab_size, (case.num_micro_batches, 1, NUM_TOKENS + 1), generator=generator
        )
        assembly.loss.num_tokens = ids[..., 1:].numel() * case.degrees.dp
        hidden = (1, NUM_TOKENS // case.degrees.tp, SHAPE.d_model)
        batches = [MicroBatch(row[:, :-1].contiguous(), row[:, 1:].contiguous(), hidden) for row in ids]
        with loss_context(case.degrees.tp), torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            parts = assembly.runtime.step(batches)
        data.reduce()
        optimizer.step()
        data.updated()
        losses += [part.item() for part in parts]
    data.gather()
    return losses


LAYOUTS = [
    Case(Degrees(tp=2)),
    Case(Degrees(tp=2), autocast=True),
    Case(Degrees(dp=2, dp_shard=2), data=DataParallel.FSDP2),
    Case(Degrees(dp=2, dp_shard=2), data=DataParallel.FSDP2, autocast=True),
    Case(Degrees(pp=2), num_micro_batches=3),
    Case(Degrees(pp=2, vpp=2), schedule=Schedule.ZBV),
    Case(Degrees(tp=2, pp=2), data=DataParallel.ZERO1),
]


@pytest.mark.ranks
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_gradients_do_not_change_by_a_bit_under_a_layout(case: Case) -> None:
    for done in run_ranks(compare, case.degrees.world_size, case):
        for mode, counts in done.items():
            assert (counts["num_replays"] > 0) == (counts["recomputed_bytes"] > 0) == (mode != "swap")
            assert (counts["num_fetched_ahead"] > 0) == (counts["swapped_bytes"] > 0) == (mode != "recompute")


@dataclass(frozen=True)
class Row:
    """A packed row, as Block takes it."""

    positions: torch.Tensor
    attention: SequenceAttention

    def attend(self, *qkv: torch.Tensor) -> torch.Tensor:
        """Over all ranks of the group."""
        return self.attention.attend(*qkv)


def over_a_sequence_group(rank: int, world_size: int, ulysses: int, autocast: bool) -> dict[str, float]:
    """Shares of bytes recomputed by each mode, after checking that nothing changed."""
    parallel = init(Degrees(dp=world_size), device="cpu")
    ranks = range(world_size)
    layout = SequenceLayout.build([800, 480], ulysses=ulysses, ring=world_size // ulysses)
    attention = SequenceAttention(layout, index=rank, ranks=ranks, groups=parallel.groups)
    tokens = torch.from_numpy(layout.tokens(rank))
    row = Row(torch.from_numpy(layout.positions(rank)), attention)
    torch.manual_seed(1)
    layers = nn.ModuleList([Block(SHAPE, Rotary(SHAPE)) for _ in range(3)])
    x = torch.randn(1, 1280, SHAPE.d_model)[:, tokens]

    def gradients() -> list[torch.Tensor]:
        layers.zero_grad()
        hidden = x.clone().requires_grad_()
        y = hidden
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for layer in layers:
                y = layer(y, packed=row)
        y.float().square().mean().backward()
        return [each.grad for each in (hidden, *layers.parameters()) if each.grad is not None]

    truth, shares = gradients(), {}
    for mode in MODES:
        plan = plan_of(mode, len(layers), len(tokens))
        with ActivationManager(layers, plan, groups=[parallel.groups.of(tuple(ranks))]) as manager:
            found = gradients()
        report = manager.report()
        assert all(map(torch.equal, found, truth)) and len(found) == len(truth), mode
        assert report.num_unreadable == report.num_other_forms == report.host_bytes == 0, report
        total = report.kept_bytes + report.swapped_bytes + report.recomputed_bytes
        shares[mode] = report.recomputed_bytes / total
    return shares


@pytest.mark.ranks
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("ulysses", [2, 1])
def test_gradients_do_not_change_by_a_bit_in_a_sequence_group(ulysses: int, autocast: bool) -> None:
    for shares in run_ranks(over_a_sequence_group, 2, ulysses, autocast):
        assert shares["swap"] == 0
        assert shares["memo-0.3"] > 0.3
        assert shares["recompute"] > 0.5


class Halves(nn.Module):
    """A layer of two parts, each of which may be sharded on its own."""

    def __init__(self) -> None:
        super().__init__()
        width = SHAPE.d_model
        self.first, self.second = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        result: torch.Tensor = x + self.second(x)
        return result


def sharded(rank: int, world_size: int, by_part: bool) -> dict[str, int]:
    """Bytes recomputed by each mode, after checking that nothing changed."""
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(1)
    layers = nn.Sequential(Halves(), Halves())
    for layer in layers:
        for part in layer.children() if by_part else ():
            fully_shard(part, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(layers, mesh=mesh)
    x = torch.randn(1, NUM_TOKENS, SHAPE.d_model, generator=torch.Generator().manual_seed(rank))

    def gradients() -> list[torch.Tensor]:
        layers.zero_grad()
        layers(x.clone().requires_grad_()).square().mean().backward()
        shards = [each.grad for each in layers.parameters()]
        return [each.to_local().clone() for each in shards if isinstance(each, DTensor)]

    truth, recomputed = gradients(), {}
    for mode in MODES:
        with ActivationManager(layers, plan_of(mode, len(layers), NUM_TOKENS)) as manager:
            found = gradients()
        assert all(map(torch.equal, found, truth)) and len(found) == len(truth), mode
        recomputed[mode] = manager.report().recomputed_bytes
    return recomputed


@pytest.mark.ranks
@pytest.mark.parametrize("by_part", [False, True])
def test_weights_that_are_gathered_for_a_part_of_a_layer_are_not_read_after_it(by_part: bool) -> None:
    for recomputed in run_ranks(sharded, 2, by_part):
        assert recomputed["swap"] == 0
        assert recomputed["recompute"] > recomputed["memo-0.3"] > 0


def disagree(rank: int, world_size: int) -> str:
    """What a rank hears whose plan differs from its group's."""
    groups = init(Degrees(tp=2), device="cpu").groups
    plan = ActivationPlan(layers=(LayerPlan.of(Split(swap=128 * (1 + rank), recompute=512)),))
    try:
        with ActivationManager([nn.Linear(2, 2)], plan, groups=[groups.axis("tp")]):
            return "went on"
    except ConfigError as error:
        dist.barrier()
        return str(error)


@pytest.mark.ranks
def test_ranks_of_a_group_with_different_plans_all_refuse_to_start() -> None:
    assert all("different activation plans" in text for text in run_ranks(disagree, 2))


class CentredOverRanks(torch.autograd.Function):
    """Takes away the sum of all ranks' means, of however many tokens each has."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        assert dist.group.WORLD is not None
        total: torch.Tensor = functional.all_reduce(x.mean((0, 1)), "sum", dist.group.WORLD)
        return x - total

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = CentredOverRanks.apply(self.inner(x).sin())  # type: ignore[no-untyped-call]
        done: torch.Tensor = x + self.outer(centred.exp())
        return done


def one_rank_has_another_length(rank: int, world_size: int, mode: str) -> list[list[float]]:
    """Losses and gradients of each step, without a manager and with one."""
    torch.manual_seed(0)
    layers = nn.Sequential(Centred(), Centred())
    runs = []
    for plan in (None, plan_of(mode, 2, 256)):
        found = []
        with ActivationManager(layers, plan) if plan else nullcontext():
            for step, num_tokens in enumerate((256, 384 if rank else 256, 256)):
                layers.zero_grad()
                x = torch.randn(1, num_tokens, 16, generator=torch.Generator().manual_seed(step))
                loss = layers(x.requires_grad_()).square().mean()
                loss.backward()
                grads = [
                    weight.grad.sum().item() for weight in layers.parameters() if weight.grad is not None
                ]
                found += [loss.item(), *grads]
        runs.append(found)
    return runs


@pytest.mark.parametrize("mode", ["recompute", "memo-0.5"])
def test_collectives_of_ranks_with_other_lengths_are_never_done_by_one_alone(mode: str) -> None:
    for true, managed in run_ranks(one_rank_has_another_length, 2, mode):
        assert managed == true
