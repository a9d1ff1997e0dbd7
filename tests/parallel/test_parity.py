"""Every layout trains the same model as one process: loss, every gradient and the weights, in float64."""

from dataclasses import replace

import pytest

from distrain.core.config import OptimizerConfig
from distrain.core.vocabulary import DataParallel as Data
from distrain.core.vocabulary import Degrees, Schedule
from helpers.parity import SHAPE, Case, difference, merge, one_process, under_layout
from helpers.ranks import run_ranks

UNEVEN = (16, 24, 8, 32)
LAMB = OptimizerConfig(name="lamb", lr=1e-2, clip=0.5)
GPIPE, ONE_F_ONE_B, INTERLEAVED, ZBV = Schedule

TENSOR = [Case(Degrees(tp=2)), Case(Degrees(tp=4))]
PIPELINE = [
    Case(Degrees(pp=pp, vpp=vpp), schedule=schedule, lengths=UNEVEN)
    for pp in (2, 4)
    for schedule, vpp in ((GPIPE, 1), (ONE_F_ONE_B, 1), (INTERLEAVED, 2), (ZBV, 2))
]
REPLICAS = [
    *(Case(Degrees(dp=dp), data=data) for dp in (2, 4) for data in (Data.DDP, Data.ZERO1)),
    *(Case(Degrees(dp=dp, dp_shard=dp), data=Data.FSDP2) for dp in (2, 4)),
    Case(Degrees(dp=4, dp_shard=2), data=Data.HSDP),
    *(Case(Degrees(dp=2), data=data, smallest_bucket_bytes=1 << 23) for data in (Data.DDP, Data.ZERO1)),
]
COMBINED = [
    Case(Degrees(tp=2, pp=2), lengths=UNEVEN),
    Case(Degrees(tp=2, pp=2, vpp=2), schedule=ZBV, lengths=UNEVEN),
    Case(Degrees(pp=2, dp=2), lengths=UNEVEN),
    Case(Degrees(pp=2, dp=2), data=Data.ZERO1, lengths=UNEVEN),
    Case(Degrees(pp=2, dp=2, dp_shard=2), data=Data.FSDP2, lengths=UNEVEN),
    Case(Degrees(pp=2, dp=2, vpp=2, dp_shard=2), schedule=ZBV, data=Data.FSDP2, lengths=UNEVEN),
    Case(Degrees(pp=2, dp=2, vpp=2), schedule=INTERLEAVED, data=Data.ZERO1, lengths=UNEVEN),
    Case(Degrees(tp=2, dp=2)),
    Case(Degrees(tp=2, dp=2), data=Data.ZERO1),
    Case(Degrees(tp=2, dp=2, dp_shard=2), data=Data.FSDP2),
    Case(Degrees(tp=2, pp=2, dp=2), lengths=UNEVEN),
    Case(Degrees(tp=2, pp=2, dp=2), data=Data.ZERO1, lengths=UNEVEN),
    Case(Degrees(tp=2, pp=2, dp=2, dp_shard=2), data=Data.FSDP2, lengths=UNEVEN),
    Case(Degrees(tp=2, dp=2), data=Data.ZERO1, optimizer=LAMB),
    Case(Degrees(dp=2, dp_shard=2), data=Data.FSDP2, optimizer=LAMB),
    Case(Degrees(tp=2, pp=2), optimizer=LAMB, lengths=UNEVEN),
]
VARIANTS = [
    Case(Degrees(tp=2, pp=2), shape=replace(SHAPE, parallel_block=True), lengths=UNEVEN),
    Case(Degrees(tp=2), shape=replace(SHAPE, window=5)),
]


@pytest.mark.ranks
@pytest.mark.parametrize("case", [*TENSOR, *PIPELINE, *REPLICAS, *COMBINED, *VARIANTS], ids=str)
def test_a_layout_trains_as_one_process_does(case: Case) -> None:
    outcomes = run_ranks(under_layout, case.degrees.world_size, case)
    reference = one_process(case)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(reference.losses, rel=1e-12)
        assert outcome.norms == pytest.approx(reference.norms, rel=1e-11)
    gradients = merge([outcome.gradients for outcome in outcomes])
    weights = merge([outcome.weights for outcome in outcomes])
    assert gradients.keys() == reference.gradients.keys()
    assert difference(gradients, reference.gradients) <= 1e-12
    assert difference(weights, reference.weights) <= 1e-10
