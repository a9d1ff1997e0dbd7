"""Memory of layouts: counted tensors, tables of states, and what must grow or shrink with what."""

from dataclasses import replace
from typing import Any

import pytest

from distrain.core.errors import ConfigError
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
from distrain.planners.activations import Precision, token_bytes
from distrain.planners.memory import MemoryEstimate, RankMemory, estimate

GPUS = ClusterSpec(num_nodes=4, devices_per_node=8, device=DEVICES["a100-80g"], host_memory_bytes=1024 * GIB)
CPUS = ClusterSpec(num_nodes=1, devices_per_node=4, device=DEVICES["cpu"], host_memory_bytes=16 * GIB)
SMALL = ModelShape(d_model=128, num_layers=4, num_heads=8, num_kv_heads=4, d_ffn=384, vocab_size=512)
P = SMALL.num_params


def memory(degrees: Degrees, shape: ModelShape = SMALL, **changes: Any) -> MemoryEstimate:
    given: dict[str, Any] = {
        "schedule": Schedule.ONE_F_ONE_B,
        "data": DataParallel.DDP,
        "micro_batch_size": 2,
        "seq_len": 64,
        "micro_batches": 1,
        "dtype": "float32",
        "optimizer": "adamw",
        "cluster": GPUS,
    }
    return estimate(shape, degrees, **(given | changes))


def states(rank: RankMemory) -> tuple[int, int, int]:
    return rank.parameters_bytes, rank.gradients_bytes, rank.optimizer_bytes


@pytest.mark.parametrize(
    ("tp", "dtype", "total"),
    [(1, "float32", 14880), (1, "bfloat16", 10016), (2, "float32", 8208), (2, "bfloat16", 5392)],
)
def test_a_token_leaves_as_many_bytes_as_were_counted_on_the_model(tp: int, dtype: str, total: int) -> None:
    # Counted with saved-tensor hooks on one layer, final norm, head and loss of the trainer's decoder on CPUs.
    token = token_bytes(SMALL, tp=tp, precision=Precision.of(dtype), fused_norms=False)
    assert token.layer + token.output + token.logits == total


def test_one_rank_keeps_weights_gradients_and_two_moments() -> None:
    assert states(memory(Degrees()).ranks[0]) == (4 * P, 4 * P, 8 * P)
    assert states(memory(Degrees(), dtype="float64").ranks[0]) == (8 * P, 8 * P, 16 * P)
    cast = P - SMALL.num_layers * 2 * 128 - 128 - 512 * 128
    assert states(memory(Degrees(), dtype="bfloat16").ranks[0]) == (4 * P + 2 * cast, 4 * P, 8 * P)
    assert memory(Degrees(), optimizer="lamb").ranks[0].optimizer_bytes == 12 * P


def test_replicas_share_states_by_their_kind() -> None:
    four = Degrees(dp=4)
    assert states(memory(four).ranks[0]) == (4 * P, 4 * P, 8 * P)
    assert states(memory(four, data=DataParallel.ZERO1).ranks[0]) == (4 * P, 4 * P + P, 2 * P)
    whole = replace(four, dp_shard=4)
    assert states(memory(whole, data=DataParallel.FSDP2).ranks[0]) == (P, P, 2 * P)
    accumulating = memory(whole, data=DataParallel.FSDP2, micro_batches=2).ranks[0]
    assert states(accumulating) == (P, P + 4 * P, 2 * P)
    halves = replace(four, dp_shard=2)
    assert states(memory(halves, data=DataParallel.HSDP).ranks[0]) == (2 * P, 2 * P, 4 * P)


def test_fsdp2_gathers_two_layers_at_a_time_but_everything_in_a_pipeline() -> None:
    deep = replace(SMALL, num_layers=32)
    alone = memory(Degrees(dp=4, dp_shard=4), deep, data=DataParallel.FSDP2).ranks[0]
    plain = memory(Degrees(dp=4), deep).ranks[0]
    assert alone.total_bytes < plain.total_bytes
    piped = memory(Degrees(pp=2, dp=4, dp_shard=4), deep, data=DataParallel.FSDP2).ranks[0]
    assert piped.buffers_bytes > 4 * deep.num_params // 2


def test_tensor_parallelism_divides_matrices_but_not_norms_or_gathered_inputs() -> None:
    one, two = memory(Degrees()).ranks[0], memory(Degrees(tp=2)).ranks[0]
    norms = 4 * (SMALL.num_layers * 2 * 128 + 128)
    assert two.parameters_bytes - norms == (one.parameters_bytes - norms) / 2
    assert two.activations_bytes > one.activations_bytes / 2
    assert two.logits_bytes == one.logits_bytes / 2


def test_stages_of_a_pipeline_hold_what_their_schedule_keeps_in_flight() -> None:
    many: dict[str, Any] = {"micro_batches": 8}
    one = memory(Degrees()).ranks[0]
    flush = memory(Degrees(pp=4), **many).ranks
    middle = [rank.activations_bytes for rank in flush]
    assert middle[0] == 4 * middle[2] / 2 == 4 * (middle[1] / 3)
    gpipe = memory(Degrees(pp=4), schedule=Schedule.GPIPE, **many).ranks
    assert gpipe[0].activations_bytes == 2 * middle[0]
    assert gpipe[3].logits_bytes == flush[3].logits_bytes / 3 * 10
    assert [rank.logits_bytes > 0 for rank in flush] == [False, False, False, True]
    assert sum(rank.parameters_bytes for rank in flush) == one.parameters_bytes


def test_zbv_has_embedding_and_head_on_one_rank_and_no_more_in_flight_than_1f1b() -> None:
    zbv = memory(Degrees(pp=2, vpp=2), schedule=Schedule.ZBV, micro_batches=8).ranks
    flush = memory(Degrees(pp=2), micro_batches=8).ranks
    assert zbv[0].logits_bytes > 0 == zbv[1].logits_bytes
    output = 128 * token_bytes(SMALL, tp=1, precision=Precision.of("float32"), fused_norms=True).output
    assert zbv[0].activations_bytes - output == flush[0].activations_bytes


@pytest.mark.parametrize("change", [{"micro_batch_size": 4}, {"seq_len": 128}])
def test_activations_grow_with_the_tokens_of_a_micro_batch(change: dict[str, Any]) -> None:
    before, after = memory(Degrees()).ranks[0], memory(Degrees(), **change).ranks[0]
    assert after.activations_bytes == 2 * before.activations_bytes
    assert states(after) == states(before)


def test_a_window_needs_its_mask() -> None:
    windowed = memory(Degrees(), replace(SMALL, window=16)).ranks[0]
    assert windowed.buffers_bytes - memory(Degrees()).ranks[0].buffers_bytes == 64 * 64 * 5


def test_the_175b_model_fits_96_devices_with_tensor_and_pipeline_parallelism_only() -> None:
    shape = PRESETS["175b"]
    common: dict[str, Any] = {"micro_batch_size": 1, "seq_len": 2048, "micro_batches": 128}
    cluster = replace(GPUS, num_nodes=12)
    alone = memory(
        Degrees(dp=96, dp_shard=96),
        shape,
        data=DataParallel.FSDP2,
        dtype="bfloat16",
        cluster=cluster,
        **common,
    )
    assert alone.shortfall_bytes > 500 * GIB
    (problem,) = alone.problems()
    assert "device's memory" in problem.error
    assert "73.60 GiB" in problem.allowed
    model_parallel = memory(Degrees(tp=8, pp=12), shape, dtype="bfloat16", cluster=cluster, **common)
    assert model_parallel.shortfall_bytes == 0
    assert model_parallel.problems() == []
    assert model_parallel.worst_rank == 0


def test_the_host_holds_processes_and_on_a_cpu_everything() -> None:
    gpus = memory(Degrees(dp=8))
    assert 8 * 3 * GIB < gpus.host_bytes < 8 * 3 * GIB + 10**6
    fewer = memory(Degrees(dp=2))
    assert fewer.host_bytes * 4 == gpus.host_bytes
    cpus = memory(Degrees(dp=4), cluster=CPUS)
    assert cpus.host_bytes >= 4 * cpus.peak_bytes + 2 * GIB
    crowded = memory(Degrees(dp=4), cluster=replace(CPUS, host_memory_bytes=GIB))
    (problem,) = crowded.problems()
    assert "host's memory" in problem.error
    assert crowded.shortfall_bytes == crowded.host_bytes - GIB


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such precision"):
        memory(Degrees(), dtype="float8")
