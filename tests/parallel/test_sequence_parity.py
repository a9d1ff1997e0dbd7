"""Sequences in groups of ranks train the model as one process does, whatever the groups: in float64, every gradient."""

from dataclasses import dataclass, replace

import pytest
import torch.distributed as dist
from torch import Tensor

from distrain.core.vocabulary import DataParallel as Data
from distrain.core.vocabulary import Degrees, ModelShape, Schedule
from distrain.parallel import init
from distrain.parallel.sequence.adaptive import SequenceGroups, places
from helpers.parity import difference, merge
from helpers.ranks import RankFailure, run_ranks
from helpers.sequences import SequenceCase, alone, in_groups, plan_of

SHAPE = ModelShape(d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, d_ffn=48, vocab_size=64)
ALL = tuple(range(8))
MIXED = (
    (((0, 1), (1, 4)), ((2,), (0, 6)), ((3,), (5,))),
    (((0, 1, 2, 3), (7, 2)),),
    (((1,), (3,)),),  # three slots have nothing to do
)
REORDERED = (
    (((0,), (3,)), ((1,), (6,)), ((2, 3), (5, 2, 0))),
    (((0, 3), (4, 1)), ((1, 2), (7,))),
)
ONE_BY_ONE = (
    (((0,), ALL[:2]), ((1,), ALL[2:4])),
    (((0, 1), (4, 5)),),
    (((0,), ALL[6:]),),  # slots 2 and 3 have nothing to do in all of the step
)
OF_TWO = (
    (((0, 1), (7, 1)),),
    (((0,), (0, 6)), ((1,), (5,))),
    (((1,), (2, 3, 4)),),
)


def case(dp: int, groups: tuple = MIXED, ring: int = 0, **other: object) -> SequenceCase:  # type: ignore[type-arg]
    degrees = {name: other.pop(name) for name in ("tp", "pp", "vpp", "dp_shard") if name in other}
    shape = replace(SHAPE, **other.pop("options", {}))  # type: ignore[arg-type]
    return SequenceCase(degrees=Degrees(dp=dp, **degrees), shape=shape, groups=groups, ring=ring, **other)  # type: ignore[arg-type]


def whole(dp: int) -> tuple:  # type: ignore[type-arg]
    """One group of all slots, twice."""
    return ((tuple(range(dp)), ALL[:3]),), ((tuple(range(dp)), ALL[3:]),)


OPTIONS = {"window": 7, "parallel_block": True}
CASES = [
    case(2, whole(2)),
    case(2, whole(2), ring=2),
    case(4, whole(4)),
    case(4, whole(4), ring=4),
    case(4, whole(4), ring=2),
    case(4),
    case(4, ring=2, options=OPTIONS),
    case(4, REORDERED, data=Data.ZERO1),
    case(4, data=Data.FSDP2, dp_shard=4),
    case(4, data=Data.HSDP, dp_shard=2),
    case(2, OF_TWO, tp=2, data=Data.ZERO1),
    case(2, OF_TWO, tp=2, ring=2, data=Data.FSDP2, dp_shard=2),
    case(2, OF_TWO, pp=2),
    case(2, OF_TWO, pp=2, data=Data.FSDP2, dp_shard=2, options=OPTIONS),
    case(2, OF_TWO, pp=2, vpp=2, schedule=Schedule.ZBV, data=Data.ZERO1),
    case(2, OF_TWO, pp=2, vpp=2, schedule=Schedule.INTERLEAVED, ring=2),
    case(4, steps=(MIXED, REORDERED, whole(4))),
    case(4, steps=(MIXED, MIXED[1:] + MIXED[:1], ONE_BY_ONE), data=Data.ZERO1, skip_idle=True),
]


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_of_any_sizes_train_as_one_process_does(case: SequenceCase) -> None:
    outcomes = run_ranks(in_groups, case.degrees.world_size, case)
    reference = alone(case)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(reference.losses, rel=1e-12)
        assert outcome.norms == pytest.approx(reference.norms, rel=1e-11)
    gradients = merge([outcome.gradients for outcome in outcomes])
    weights = merge([outcome.weights for outcome in outcomes])
    assert gradients.keys() == reference.gradients.keys()
    assert difference(gradients, reference.gradients) <= 1e-12
    assert difference(weights, reference.weights) <= 1e-10


@pytest.mark.ranks
def test_what_is_packed_with_what_and_in_which_order_changes_nothing() -> None:
    outcomes = [run_ranks(in_groups, 4, case(4, groups))[0] for groups in (MIXED, REORDERED)]
    assert difference(outcomes[0].gradients, outcomes[1].gradients) <= 1e-12
    assert difference(outcomes[0].weights, outcomes[1].weights) <= 1e-10


@dataclass(frozen=True)
class Failing:
    """Rows in which attention fails."""

    positions: Tensor

    def attend(self, *_: Tensor) -> Tensor:
        raise ArithmeticError("this rank fails")


def _fail_in_a_group(rank: int, world_size: int, failing: int) -> None:
    in_groups(rank, world_size, case(4), told=lambda row: Failing(row.positions) if rank == failing else row)


@pytest.mark.ranks
@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_inside_a_group_stops_all_and_is_the_error_that_is_shown(failing: int) -> None:
    with pytest.raises(RankFailure, match="this rank fails"):
        run_ranks(_fail_in_a_group, 4, failing)


def _many_plans(rank: int, world_size: int) -> list[int]:
    parallel = init(Degrees(dp=world_size), device="cpu")
    groups = SequenceGroups(
        range(world_size),
        slot=rank,
        groups=parallel.groups,
        split=lambda degree: (degree, 1),
        window=0,
        device=parallel.device.torch_device,
        most=2,
    )
    before = len(dist.distributed_c10d._world.pg_map)
    made = []
    others = [
        slots for slots in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (0, 1, 2)) for _ in range(2)
    ]
    for slots in [*others, *reversed(others)]:
        plan = plan_of([((slots, (0,)),)], num_slots=world_size)
        groups.rows(plan, places(plan, [12], slot=rank, split=lambda degree: (degree, 1)))
        made.append(len(dist.distributed_c10d._world.pg_map) - before)
    return made


@pytest.mark.ranks
def test_a_rank_keeps_no_more_groups_than_it_may_and_they_come_back_when_needed() -> None:
    for made in run_ranks(_many_plans, 4):
        assert max(made) == 2
