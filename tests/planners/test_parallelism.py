"""Choosing a layout: complete, exact, deterministic, and honest about what does not fit."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.core.checks import check_layout
from distrain.core.errors import ConfigError, InfeasibleError
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
from distrain.planners.cost import Calibration, step_time
from distrain.planners.memory import estimate
from distrain.planners.parallelism import Layout, ParallelPlan, choose, grid

quick = settings(max_examples=50, derandomize=True, deadline=None, database=None)

CPUS = ClusterSpec(
    num_nodes=1,
    devices_per_node=4,
    device=DEVICES["cpu"],
    host_memory_bytes=16 * GIB,
    intra_node_gb_s=5.0,
)


def gpus(num_nodes: int, name: str = "h100-80g") -> ClusterSpec:
    return ClusterSpec(
        num_nodes=num_nodes, devices_per_node=8, device=DEVICES[name], host_memory_bytes=1024 * GIB
    )


def every_legal_layout(
    shape: ModelShape, cluster: ClusterSpec, *, global_batch: int, seq_len: int
) -> set[Layout]:
    """All layouts that the checks accept, by trying everything."""
    world = cluster.world_size
    found = set()
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    for tp, pp in product(sizes, sizes):
        if cluster.devices_per_node % tp or world % (tp * pp):
            continue
        dp = world // (tp * pp)
        for schedule, vpp, data, m in product(
            Schedule, range(1, shape.num_layers + 1), DataParallel, range(1, global_batch + 1)
        ):
            if data is DataParallel.HSDP or (dp == 1 and data is not DataParallel.DDP):
                continue
            if pp == 1 and (schedule is not Schedule.ONE_F_ONE_B or vpp > 1):
                continue
            shard = dp if data is DataParallel.FSDP2 else 1
            degrees = Degrees(tp=tp, pp=pp, dp=dp, vpp=vpp, dp_shard=shard)
            if not check_layout(
                shape,
                degrees,
                schedule=schedule,
                data=data,
                micro_batches=m,
                global_batch=global_batch,
                seq_len=seq_len,
                world_size=world,
            ):
                found.add(Layout(degrees, schedule, data, m))
    return found


@pytest.mark.parametrize(
    ("nodes", "per_node", "layers", "heads", "kv_heads", "batch"),
    [(1, 4, 4, 4, 2, 8), (2, 4, 8, 8, 8, 12), (3, 2, 5, 6, 2, 6), (1, 1, 3, 2, 1, 4)],
)
def test_the_grid_holds_every_layout_that_the_checks_accept_and_no_other(
    nodes: int, per_node: int, layers: int, heads: int, kv_heads: int, batch: int
) -> None:
    shape = ModelShape(
        d_model=32 * heads,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        d_ffn=96,
        vocab_size=264,
    )
    cluster = replace(CPUS, num_nodes=nodes, devices_per_node=per_node)
    found = list(grid(shape, cluster, global_batch=batch, seq_len=48))
    assert len(found) == len(set(found))
    assert set(found) == every_legal_layout(shape, cluster, global_batch=batch, seq_len=48)


def price(
    shape: ModelShape, layout: Layout, cluster: ClusterSpec, *, global_batch: int, seq_len: int
) -> tuple[float, int]:
    """Seconds of a step and bytes that lack."""
    common: dict[str, Any] = {
        "schedule": layout.schedule,
        "data": layout.data,
        "micro_batch_size": global_batch // (layout.degrees.dp * layout.micro_batches),
        "seq_len": seq_len,
        "micro_batches": layout.micro_batches,
        "dtype": "bfloat16",
        "cluster": cluster,
    }
    time = step_time(shape, layout.degrees, calibration=Calibration.of(cluster.device), **common)
    memory = estimate(shape, layout.degrees, optimizer="adamw", **common)
    return time.total_s, memory.shortfall_bytes


@quick
@given(
    name=st.sampled_from(["125m", "1.3b", "7b"]),
    nodes=st.sampled_from([1, 2, 3]),
    device=st.sampled_from(["v100-32g", "a100-40g", "h100-80g"]),
    batch=st.sampled_from([8, 12, 48]),
)
def test_no_layout_of_the_grid_that_fits_is_faster(name: str, nodes: int, device: str, batch: int) -> None:
    shape, cluster = PRESETS[name], gpus(nodes, device)
    prices = [
        price(shape, layout, cluster, global_batch=batch, seq_len=1024)
        for layout in grid(shape, cluster, global_batch=batch, seq_len=1024)
    ]
    fitting = [seconds for seconds, lacking in prices if not lacking]
    if not fitting:
        with pytest.raises(InfeasibleError):
            choose(shape, cluster, global_batch=batch, seq_len=1024)
        return
    plan = choose(shape, cluster, global_batch=batch, seq_len=1024)
    assert plan.objective == plan.bound == min(fitting)
    assert plan.gap == 0
    assert plan.status == "optimal over the grid"
    assert ParallelPlan.from_json(plan.to_json()) == plan
    assert not check_layout(
        shape,
        plan.degrees,
        schedule=plan.schedule,
        data=plan.data,
        micro_batches=plan.micro_batches,
        global_batch=batch,
        seq_len=1024,
        world_size=cluster.world_size,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_tiny_model_on_cpus_is_plainly_replicated(ranks: int, dtype: str) -> None:
    cluster = replace(CPUS, devices_per_node=ranks)
    plan = choose(PRESETS["tiny"], cluster, global_batch=16, seq_len=128, dtype=dtype)
    assert plan.degrees == Degrees(dp=ranks)
    assert plan.data is DataParallel.DDP


def test_the_175b_model_on_1024_devices_is_cut_both_ways_with_tensor_parallelism_inside_a_node() -> None:
    plan = choose(PRESETS["175b"], gpus(128), global_batch=1536, seq_len=2048)
    assert 1 < plan.degrees.tp <= 8
    assert plan.degrees.pp > 1
    assert plan.degrees.world_size == plan.world_size == 1024
    assert plan.objective is not None
    flops = PRESETS["175b"].flops_per_token(2048) * 2048 * 1536
    assert 0.25 < flops / plan.objective / 1024 / DEVICES["h100-80g"].peak_flops < 0.6


def test_the_same_question_gets_the_same_answer() -> None:
    first, second = (choose(PRESETS["7b"], gpus(2), global_batch=64, seq_len=2048) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)


def test_reasons_name_the_choice_the_runner_up_and_what_was_too_large() -> None:
    plan = choose(PRESETS["7b"], gpus(1), global_batch=256, seq_len=4096)
    chosen, memory, tried, too_large, runner_up = plan.reasons
    assert f"tp {plan.degrees.tp} x pp {plan.degrees.pp} x dp {plan.degrees.dp}" in chosen
    assert "compute" in chosen
    assert "GiB of 73.60 GiB" in memory
    assert "layouts tried" in tried
    assert "would be faster but do not fit" in too_large
    assert runner_up.startswith("runner-up: ")


def test_a_model_that_fits_nowhere_says_how_much_the_closest_layout_lacks() -> None:
    with pytest.raises(InfeasibleError) as caught:
        choose(PRESETS["175b"], gpus(1), global_batch=16, seq_len=2048)
    (problem,) = caught.value.problems
    assert problem.error == "no layout fits the memory"
    cluster, shape = gpus(1), PRESETS["175b"]
    lacking = min(
        price(shape, layout, cluster, global_batch=16, seq_len=2048)[1]
        for layout in grid(shape, cluster, global_batch=16, seq_len=2048)
    )
    assert f"lacks {lacking / GIB:,.2f} GiB" in problem.got


def test_a_batch_that_no_replicas_divide_says_which_batch_would_do() -> None:
    narrow = replace(PRESETS["tiny"], num_layers=1, num_heads=1, num_kv_heads=1, d_model=32)
    with pytest.raises(InfeasibleError, match="uses every device") as caught:
        choose(narrow, CPUS, global_batch=6, seq_len=128)
    assert "data.global_batch=8" in caught.value.problems[0].hint


def test_impossible_models_and_batches_are_refused_with_every_reason() -> None:
    shape = replace(PRESETS["tiny"], num_heads=5)
    with pytest.raises(ConfigError) as caught:
        choose(shape, CPUS, global_batch=0, seq_len=1)
    found = str(caught.value)
    for word in ("global_batch", "num_heads", "num_kv_heads", "seq_len"):
        assert word in found
