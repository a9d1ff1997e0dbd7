"""The pipeline runtime against torch's own, and its behaviour where torch's has none."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from distrain.core.vocabulary import DataParallel, Degrees, Schedule
from distrain.parallel import MicroBatch, init
from distrain.parallel.tensor import token_loss
from distrain.planners.schedules import placement
from distrain.planners.stages import stage_layers
from distrain.train.assembly import assemble
from distrain.train.model import Decoder
from distrain.train.weights import materialize
from helpers.parity import ROWS, SEED, SHAPE
from helpers.ranks import RankFailure, run_ranks

LENGTH, NUM = 16, 4
ORACLES = {
    Schedule.GPIPE: (ScheduleGPipe, 1),
    Schedule.ONE_F_ONE_B: (Schedule1F1B, 1),
    Schedule.INTERLEAVED: (ScheduleInterleaved1F1B, 2),
    Schedule.ZBV: (ScheduleZBVZeroBubble, 2),
}


def _ids() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, SHAPE.vocab_size, (NUM * ROWS, LENGTH + 1), generator=generator)


def _ours(kind: Schedule, vpp: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    parallel = init(Degrees(pp=2, vpp=vpp), device="cpu")
    assembly = assemble(SHAPE, parallel, schedule=kind, data=DataParallel.DDP, micro_batches=NUM, seed=SEED)
    pieces = _ids().chunk(NUM)
    losses = assembly.runtime.step(
        [MicroBatch(x[:, :-1].contiguous(), x[:, 1:], (ROWS, LENGTH, SHAPE.d_model)) for x in pieces]
    )
    assembly.data.reduce()
    gradients = {}
    for shard in assembly.data.shards:
        for segment in shard.segments:
            gradients[segment.name] = shard.gradient[segment.start : segment.stop].clone()
    return losses, gradients


def _torchs(kind: Schedule, vpp: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    oracle, _ = ORACLES[kind]
    rank, num_stages = dist.get_rank(), 2 * vpp
    ranges = stage_layers(SHAPE.num_layers, num_stages)
    mine = [s for s, home in enumerate(placement(kind, num_ranks=2, stages_per_rank=vpp)) if home == rank]
    stages = []
    for index in mine:
        module = Decoder(SHAPE, first_layer=ranges[index][0], last_layer=ranges[index][1])
        materialize(module, device=torch.device("cpu"), seed=SEED, num_layers=SHAPE.num_layers)
        stages.append(PipelineStage(module, index, num_stages, torch.device("cpu")))
    runner = oracle(stages if vpp > 1 else stages[0], NUM, loss_fn=token_loss, scale_grads=False)
    ids = _ids()
    losses: list[Tensor] = []
    last = num_stages - 1 in mine
    runner.step(
        *([ids[:, :-1].contiguous()] if 0 in mine else []),
        target=ids[:, 1:].contiguous() if last else None,
        losses=losses if last else None,
    )
    gradients = {
        name: param.grad.flatten()
        for stage in stages
        for name, param in stage.submod.named_parameters()
        if param.grad is not None
    }
    return losses, gradients


def _both(rank: int, world_size: int, kind: Schedule, vpp: int) -> tuple[int, int]:
    losses, gradients = _ours(kind, vpp)
    their_losses, their_gradients = _torchs(kind, vpp)
    assert [loss.item() for loss in losses] == [loss.item() for loss in their_losses]
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, their_gradients[name]), name
    return len(losses), len(gradients)


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ORACLES)
def test_losses_and_gradients_equal_torchs_runtime_to_the_bit(kind: Schedule) -> None:
    counts = run_ranks(_both, 2, kind, ORACLES[kind][1])
    assert sum(losses for losses, _ in counts) == NUM
    assert sum(params for _, params in counts) == len(list(Decoder(SHAPE).parameters()))


def _fail_in_stage(rank: int, world_size: int, failing: int) -> None:
    parallel = init(Degrees(pp=world_size), device="cpu")
    assembly = assemble(
        SHAPE, parallel, schedule=Schedule.ONE_F_ONE_B, data=DataParallel.DDP, micro_batches=NUM, seed=SEED
    )
    if rank == failing:

        def refuse(*_: object) -> None:
            raise ArithmeticError("this stage fails")

        next(iter(assembly.modules.values())).register_forward_pre_hook(refuse)
    pieces = _ids().chunk(NUM)
    assembly.runtime.step([MicroBatch(x[:, :-1], x[:, 1:], (ROWS, LENGTH, SHAPE.d_model)) for x in pieces])


@pytest.mark.ranks
@pytest.mark.parametrize("failing", [0, 1, 3])
def test_a_failing_stage_is_the_error_that_is_shown(failing: int) -> None:
    with pytest.raises(RankFailure, match="this stage fails"):
        run_ranks(_fail_in_stage, 4, failing)


def _evaluate(rank: int, world_size: int, kind: Schedule, vpp: int) -> list[float]:
    parallel = init(Degrees(pp=2, vpp=vpp), device="cpu")
    assembly = assemble(SHAPE, parallel, schedule=kind, data=DataParallel.DDP, micro_batches=NUM, seed=SEED)
    share = [MicroBatch(x[:, :-1], x[:, 1:], (ROWS, LENGTH, SHAPE.d_model)) for x in _ids().chunk(NUM)]
    forward_only = [loss.item() for loss in assembly.runtime.evaluate(share)]
    assert not any(
        param.grad is not None for module in assembly.modules.values() for param in module.parameters()
    )
    assert forward_only == [loss.item() for loss in assembly.runtime.step(share)]
    assembly.data.reduce()
    return forward_only


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kind", "vpp"), [(Schedule.ONE_F_ONE_B, 1), (Schedule.INTERLEAVED, 2), (Schedule.ZBV, 2)]
)
def test_evaluation_runs_the_forwards_of_a_schedule_and_leaves_no_gradient(kind: Schedule, vpp: int) -> None:
    losses = run_ranks(_evaluate, 2, kind, vpp)
    assert sorted(len(each) for each in losses) == [0, NUM]
