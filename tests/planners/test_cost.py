"""The time model: published throughputs, and what must get faster or slower with what."""

from dataclasses import replace
from typing import Any

import pytest

from distrain.core.vocabulary import (
    DEVICES,
    GIB,
    PRESETS,
    ClusterSpec,
    DataParallel,
    Degrees,
    ModelShape,
    Schedule,
)
from distrain.planners.cost import Calibration, StepTime, step_time
from distrain.planners.schedules import build
from distrain.planners.timeline import simulate
from distrain.planners.traffic import bandwidth
from distrain.planners.work import slowest_stage

A100 = ClusterSpec(num_nodes=8, devices_per_node=8, device=DEVICES["a100-80g"], host_memory_bytes=1024 * GIB)
SHAPE = PRESETS["7b"]


def seconds(degrees: Degrees, shape: ModelShape = SHAPE, **changes: Any) -> StepTime:
    given: dict[str, Any] = {
        "schedule": Schedule.ONE_F_ONE_B,
        "data": DataParallel.DDP,
        "micro_batch_size": 1,
        "seq_len": 2048,
        "micro_batches": 16,
        "dtype": "bfloat16",
        "cluster": A100,
        "calibration": Calibration(),
    }
    return step_time(shape, degrees, **(given | changes))


# PTD-P (2104.04473), table 1: heads, d, layers, tp, pp, devices, batch, TFLOP/s a device.
TABLE_1 = [
    (24, 2304, 24, 1, 1, 32, 512, 137),
    (32, 3072, 30, 2, 1, 64, 512, 138),
    (32, 4096, 36, 4, 1, 128, 512, 142),
    (48, 6144, 40, 8, 1, 256, 1024, 135),
    (64, 8192, 48, 8, 2, 512, 1536, 138),
    (80, 10240, 60, 8, 4, 1024, 1792, 140),
    (96, 12288, 80, 8, 8, 1536, 2304, 148),
    (128, 16384, 96, 8, 16, 1920, 2160, 155),
    (128, 20480, 105, 8, 35, 2520, 2520, 163),
    (160, 25600, 128, 8, 64, 3072, 3072, 163),
]


def throughput(heads: int, d: int, layers: int, tp: int, pp: int, devices: int, batch: int) -> float:
    """TFLOP/s a device with the best micro-batch size; their runs computed every forward twice."""
    shape = ModelShape(
        d_model=d,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        d_ffn=8 * d // 3,
        vocab_size=51_200,
    )
    degrees = Degrees(tp=tp, pp=pp, dp=devices // (tp * pp))
    best = 0.0
    for size in (1, 2, 4, 8):
        if batch // degrees.dp % size == 0:
            time = seconds(
                degrees,
                shape,
                micro_batch_size=size,
                micro_batches=batch // degrees.dp // size,
                cluster=replace(A100, num_nodes=devices // 8),
            )
            again = time.total_s + time.compute_s / 3 + time.tensor_s / 2
            flops = 4 / 3 * shape.flops_per_token(2048) * 2048 * batch
            best = max(best, flops / again / devices / 1e12)
    return best


def test_published_throughputs_are_met_within_a_quarter_and_an_eighth_on_average() -> None:
    errors = [throughput(*row[:-1]) / row[-1] - 1 for row in TABLE_1]
    assert max(map(abs, errors)) < 0.25
    assert sum(map(abs, errors)) / len(errors) < 0.15


def test_the_work_of_a_stage_adds_up_to_the_models_flops() -> None:
    work = slowest_stage(SHAPE, 1, 1, Schedule.ONE_F_ONE_B, 2048)
    total = work.forward_flops + work.backward_input_flops + work.backward_weight_flops
    assert total == pytest.approx(SHAPE.flops_per_token(2048), rel=1e-4)


def test_a_pipeline_waits_for_the_rank_with_the_head() -> None:
    wide = replace(SHAPE, vocab_size=512_000)
    last = slowest_stage(wide, 4, 1, Schedule.ONE_F_ONE_B, 2048)
    total = slowest_stage(wide, 1, 1, Schedule.ONE_F_ONE_B, 2048)
    assert last.forward_flops > total.forward_flops / 4
    assert last.rank_params > wide.num_params / 4


def test_the_estimate_of_a_pipeline_is_what_its_simulation_takes_without_messages() -> None:
    calibration = Calibration(message_s=0.0)
    for schedule, vpp in ((Schedule.ONE_F_ONE_B, 1), (Schedule.INTERLEAVED, 4), (Schedule.ZBV, 2)):
        shape = replace(SHAPE, vocab_size=64)  # next to no head: all stages alike
        degrees = Degrees(pp=4, vpp=vpp)
        fast = replace(A100, inter_node_gb_s=1e9, intra_node_gb_s=1e9)
        time = seconds(degrees, shape, schedule=schedule, cluster=fast, calibration=calibration)
        work = slowest_stage(shape, 4, vpp, schedule, 2048)
        flops = work.forward_flops + work.backward_input_flops + work.backward_weight_flops
        second = time.compute_s / 16 / vpp / flops
        timeline = simulate(
            build(schedule, num_ranks=4, micro_batches=16, stages_per_rank=vpp),
            forward=work.forward_flops * second,
            backward_input=work.backward_input_flops * second,
            backward_weight=work.backward_weight_flops * second,
        )
        assert time.compute_s + time.bubble_s == pytest.approx(timeline.makespan, rel=0.01)


def test_more_bandwidth_is_never_slower_and_helps_what_it_should() -> None:
    degrees = Degrees(tp=8, pp=2, dp=4)
    slow, node, net = (
        seconds(degrees, cluster=cluster)
        for cluster in (A100, replace(A100, intra_node_gb_s=600.0), replace(A100, inter_node_gb_s=100.0))
    )
    assert node.tensor_s < slow.tensor_s
    assert node.messages_s == slow.messages_s
    assert net.messages_s < slow.messages_s
    assert net.tensor_s == slow.tensor_s
    assert max(node.total_s, net.total_s) < slow.total_s


def test_rings_leave_their_node_through_the_links_of_all_members_there() -> None:
    assert bandwidth(A100, size=8, stride=1) == 300e9
    assert bandwidth(A100, size=64, stride=1) == 200e9
    assert bandwidth(A100, size=32, stride=2) == 100e9
    assert bandwidth(A100, size=8, stride=8) == 25e9


def test_interleaving_trades_bubble_for_messages() -> None:
    plain = seconds(Degrees(pp=8))
    interleaved = seconds(Degrees(pp=8, vpp=4), schedule=Schedule.INTERLEAVED)
    assert interleaved.bubble_s < plain.bubble_s / 3
    assert interleaved.messages_s == pytest.approx(4 * plain.messages_s)
    zbv = seconds(Degrees(pp=8, vpp=2), schedule=Schedule.ZBV)
    assert zbv.bubble_s < plain.bubble_s / 3


def test_smaller_micro_batches_use_the_device_less_well() -> None:
    large, small = (seconds(Degrees(), micro_batch_size=size, micro_batches=16 // size) for size in (4, 1))
    assert large.compute_s < small.compute_s


def test_replicas_pay_for_what_they_exchange_and_save_on_the_update() -> None:
    slow = replace(A100, inter_node_gb_s=1.0)
    ddp, zero1, fsdp2 = (
        seconds(
            Degrees(dp=64, dp_shard=64 if data is DataParallel.FSDP2 else 1),
            data=data,
            micro_batches=4,
            cluster=slow,
        )
        for data in (DataParallel.DDP, DataParallel.ZERO1, DataParallel.FSDP2)
    )
    assert ddp.reduction_s > 0
    assert zero1.optimizer_s == fsdp2.optimizer_s == pytest.approx(ddp.optimizer_s / 64)
    assert fsdp2.reduction_s > 2 * ddp.reduction_s  # gathers for each micro-batch
    hsdp = seconds(Degrees(dp=64, dp_shard=8), data=DataParallel.HSDP, micro_batches=4, cluster=slow)
    assert hsdp.reduction_s < fsdp2.reduction_s  # gathers inside the node
    assert seconds(Degrees()).reduction_s == 0


def test_parts_add_up() -> None:
    time = seconds(Degrees(tp=2, pp=2, dp=2))
    assert sum(time.parts().values()) == time.total_s
    assert list(time.parts()) == ["compute", "tensor", "messages", "bubble", "reduction", "optimizer"]
