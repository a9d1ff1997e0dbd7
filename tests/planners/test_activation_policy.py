"""Keep, swap, recompute: MEMO's numbers, an exact clock, and a program that no policy beats."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.core.errors import ConfigError, InfeasibleError
from distrain.core.vocabulary import Schedule
from distrain.planners.activation_plan import TOKENS
from distrain.planners.activation_policy import (
    ActivationTask,
    MemoAlpha,
    Policy,
    TensorGroup,
    choose,
    memo_alpha,
    replay,
)
from distrain.planners.activation_policy.problem import Pass, stage_passes, uniform, whole_tokens
from distrain.planners.closed_forms import depth
from distrain.planners.schedules import build

GIB = 2**30
K = 1024


def memo_7b(tokens: int, *, bandwidth: float = 11e9, host_gib: float = 2048) -> MemoAlpha:
    """MEMO's 7B on 8 GPUs that achieve 172 TFLOP/s."""
    unit = 2 * tokens * 4096 / 8
    flops = 24 * tokens * 4096**2 + 2 * tokens**2 * 4096
    return memo_alpha(
        input_bytes=unit, attention_bytes=unit, other_bytes=14 * unit, num_layers=32,
        forward_s=flops / 8 / 172e12, bytes_per_s=bandwidth, host_bytes=host_gib * GIB / 8,
    )  # fmt: skip


def test_memos_alpha_at_a_million_tokens_is_0_467() -> None:
    found = memo_7b(1024 * K)
    assert found.alpha == pytest.approx(0.467, abs=5e-4)
    assert found.binding == "host"
    assert "the host row binds" in found.explanation


def test_alpha_rises_with_the_length_stays_and_falls() -> None:
    found = {length: memo_7b(length * K) for length in (64, 128, 256, 512, 546, 547, 1024)}
    assert [each.binding for each in found.values()] == ["overlap"] * 2 + ["none"] * 3 + ["host"] * 2
    assert found[64].alpha is not None
    assert found[128].alpha is not None
    assert found[64].alpha < found[128].alpha < 1
    assert found[256].alpha == 1
    # All of it fits the host while 30 layers x 16 units do: up to 559,240 tokens.
    assert memo_7b(559_240).alpha == 1
    assert memo_7b(559_400).binding == "host"


def test_the_crossover_of_the_paper_is_at_192k() -> None:
    assert memo_7b(192 * K).overlap == pytest.approx(1, abs=0.03)


def test_what_breaks_a_row_is_said_and_not_clipped() -> None:
    slow = memo_7b(64 * K, bandwidth=1e8)
    assert slow.alpha is None
    assert slow.overlap < 0 < slow.overlap_deficit_s
    assert "ms longer than the forward of a layer" in slow.explanation
    small = memo_7b(1024 * K, host_gib=100)
    assert small.alpha is None
    assert small.host_deficit_bytes == pytest.approx(30 * 2 * GIB - 100 * GIB / 8)
    assert "exceed the host by 47.5 GiB" in small.explanation


ONE_STEP = (Pass(False, 0), Pass(True, 0))


def task(
    *,
    layers: int = 4,
    bandwidth: float = 1.0,
    host: float = 1e9,
    device: float = 1e9,
    passes: tuple[Pass, ...] = ONE_STEP,
    other_s: float = 3.0,
) -> ActivationTask:
    """Layers of 10 s forward, 20 s backward, that leave 4 bytes of input and 8 of the rest."""
    return ActivationTask(
        groups=(TensorGroup("input", 4, None), TensorGroup("rest", 8, other_s)),
        num_layers=layers, num_tokens=16 * TOKENS, forward_s=10.0, backward_s=20.0, passes=passes,
        d2h_bytes_s=bandwidth, h2d_bytes_s=bandwidth, host_bytes=host, device_bytes=device,
    )  # fmt: skip


SWAP_ALL, SWAP_INPUT, KEEP_ALL = ([0, 0], [1, 1]), ([0, 0], [1, 0]), ([1, 1], [0, 0])


def test_a_copy_that_takes_too_long_stalls_the_forward_that_needs_its_buffer() -> None:
    found = replay(task(), uniform(task(), kept=SWAP_ALL[0], swapped=SWAP_ALL[1]))
    spans = {(span.stream, span.label): (span.start_s, span.end_s) for span in found.spans}
    # Layer 0 leaves from 10 to 22, layer 1 queues behind it: its forward ended at 20, its copy at 34.
    assert spans["to host", "F0.0"] == (10, 22)
    assert spans["to host", "F1.0"] == (22, 34)
    assert spans["compute", "F2.0"] == (22, 32)
    assert spans["compute", "F3.0"] == (34, 44)
    # Layers 3 and 2 stayed. Layer 1 comes into layer 3's buffer while layer 2 runs backward.
    assert spans["compute", "B3.0"] == (44, 64)
    assert spans["from host", "B1.0"] == (64, 76)
    assert spans["compute", "B1.0"] == (84, 104)
    assert spans["from host", "B0.0"] == (84, 96)
    assert (found.total_s, found.stall_s, found.recompute_s) == (124, 4, 0)
    assert found.compute_s == 120
    assert found.host_bytes == 24
    assert found.device_bytes == 24


def test_what_is_made_again_takes_its_time_and_no_memory() -> None:
    found = replay(task(), uniform(task(), kept=SWAP_INPUT[0], swapped=SWAP_INPUT[1]))
    assert (found.total_s, found.stall_s, found.recompute_s) == (126, 0, 6)
    assert found.host_bytes == 8
    kept = replay(task(), uniform(task(), kept=KEEP_ALL[0], swapped=KEEP_ALL[1]))
    assert (kept.total_s, kept.host_bytes, kept.device_bytes) == (120, 0, 48)


def test_dropping_what_is_never_made_again_is_an_error() -> None:
    nothing = Policy(((0, 0),) * 4, ((0, 0),) * 4)
    with pytest.raises(ValueError, match="input of layer 0 is not made again"):
        replay(task(), nothing)


def test_the_device_is_used_first_then_the_host_then_time() -> None:
    roomy = choose(task())
    assert (roomy.replay.total_s, roomy.replay.host_bytes) == (120, 0)
    beside = choose(task(device=24, bandwidth=10.0))
    assert beside.replay.total_s == pytest.approx(120)
    assert beside.replay.recompute_s == 0
    assert beside.replay.host_bytes == 24
    tight = choose(task(device=24, bandwidth=10.0, host=10))
    assert tight.replay.recompute_s > 0
    assert tight.replay.host_bytes <= 10
    slow = choose(task(device=24, bandwidth=0.5))
    assert slow.replay.recompute_s > 0


tasks = st.builds(
    task,
    layers=st.integers(3, 6),
    bandwidth=st.sampled_from([0.3, 0.7, 1.0, 2.0, 8.0]),
    host=st.sampled_from([30.0, 40.0, 60.0, 100.0]),
    device=st.sampled_from([24.0, 40.0, 60.0]),
    other_s=st.sampled_from([0.5, 3.0, 9.0]),
)


@given(tasks)
@settings(derandomize=True, deadline=None, database=None, max_examples=40)
def test_no_uniform_policy_is_faster_and_memory_is_never_exceeded(given_task: ActivationTask) -> None:
    try:
        choice = choose(given_task)
    except InfeasibleError:
        return
    found = choice.replay
    assert found.host_bytes <= given_task.host_bytes + 1e-6
    assert found.device_bytes <= given_task.device_bytes + 1e-6
    assert choice.bound_s <= found.total_s + 1e-6
    grid = [0, 0.25, 0.5, 0.75, 1]
    for keep, swap in product(grid, grid):
        if keep + swap > 1:
            continue
        other = replay(given_task, uniform(given_task, kept=[0, keep], swapped=[1, swap]))
        fits = other.host_bytes <= given_task.host_bytes and other.device_bytes <= given_task.device_bytes
        assert not fits or choice.bound_s <= other.total_s + 1e-4
    for kept, swapped in zip(choice.policy.kept, choice.policy.swapped, strict=True):
        for group, k, w in zip(given_task.groups, kept, swapped, strict=True):
            rest = given_task.num_tokens - k - w
            assert rest == 0 or (rest >= TOKENS and group.recompute_s is not None)
            assert all(
                n % TOKENS == 0 or n in (given_task.num_tokens, given_task.num_tokens - k) for n in (k, w)
            )


def test_rounding_costs_little_and_is_said() -> None:
    choice = choose(replace(task(device=24, host=13), num_tokens=100 * TOKENS))
    assert 0 <= choice.gap < 0.02


@pytest.mark.parametrize("tokens", [128, 1000, 1024, 12_345])
@pytest.mark.parametrize("keep", [0, 0.1, 0.5, 1])
@pytest.mark.parametrize("swap", [0, 0.33, 0.5, 1])
def test_whole_tokens_leave_a_rest_of_128_or_none(tokens: int, keep: float, swap: float) -> None:
    swap = min(swap, 1 - keep)
    kept, swapped = whole_tokens(tokens, keep=keep, swap=swap, recomputed=True)
    rest = tokens - kept - swapped
    assert rest == 0 or rest >= TOKENS
    assert kept <= keep * tokens + 1e-6
    assert sum(whole_tokens(tokens, keep=keep, swap=1 - keep, recomputed=False)) == tokens


@pytest.mark.parametrize(
    ("kind", "pp", "vpp"),
    [
        (Schedule.ONE_F_ONE_B, 4, 1),
        (Schedule.GPIPE, 2, 1),
        (Schedule.INTERLEAVED, 2, 2),
        (Schedule.ZBV, 3, 2),
    ],
)
def test_in_flight_depth_is_the_schedules(kind: Schedule, pp: int, vpp: int) -> None:
    schedule = build(kind, num_ranks=pp, micro_batches=8, stages_per_rank=vpp)
    passes = stage_passes(schedule, rank=0)
    assert len(passes) == 16
    pipelined = task(layers=5, passes=passes)
    most = max(sum(counts) for counts in pipelined.in_flight)
    if vpp == 1:
        assert most == 5 * depth(kind, num_ranks=pp, micro_batches=8)[0]
    assert {each.micro_batch for each in passes} == set(range(8))


def test_a_pipeline_needs_the_memory_of_all_micro_batches_in_flight() -> None:
    schedule = build(Schedule.ONE_F_ONE_B, num_ranks=4, micro_batches=8)
    first = task(passes=stage_passes(schedule, rank=0), device=60, bandwidth=4.0)
    last = task(passes=stage_passes(schedule, rank=3), device=60, bandwidth=4.0)
    assert max(sum(counts) for counts in first.in_flight) == 16
    assert choose(last).replay.recompute_s == 0
    assert choose(last).replay.device_bytes <= 60
    found = choose(replace(first, host_bytes=100)).replay
    assert found.recompute_s > 0
    assert found.host_bytes <= 100


def test_too_little_memory_is_explained_with_numbers() -> None:
    with pytest.raises(InfeasibleError, match="rounding buffers") as caught:
        choose(task(device=20))
    assert caught.value.exit_code == 4
    with pytest.raises(InfeasibleError) as caught:
        choose(task(layers=20, device=24, host=20))
    assert "what is never made again fits neither on the host nor on the device" in str(caught.value)
    assert "18 layers in flight" in str(caught.value)


def test_impossible_numbers_are_all_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(task(), num_layers=0, forward_s=0.0, d2h_bytes_s=-1.0)
    assert len(caught.value.problems) == 3
