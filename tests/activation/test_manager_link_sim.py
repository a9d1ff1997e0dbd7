"""The simulated link: hand-made cases with known times, and the clock of the planners on a link as they believe it."""

from dataclasses import replace

import pytest

from benchmarks.activation_link import task_of
from distrain.activation.link_sim import Link, Stream, Work, run, simulate
from distrain.planners.activation_policy import ActivationTask, replay
from distrain.planners.activation_policy.problem import uniform

FAST = Link(out_bytes_s=1e15, in_bytes_s=1e15)


def small(length: int = 64 * 1024) -> ActivationTask:
    return replace(task_of(length), num_layers=6)


def test_streams_run_beside_each_other_and_work_waits_for_what_it_needs() -> None:
    link = Link(out_bytes_s=10.0, in_bytes_s=5.0)
    works = [
        Work(Stream.COMPUTE, 1.0),
        Work(Stream.OUT, 20.0, (0,)),
        Work(Stream.COMPUTE, 1.0, (0,)),
        Work(Stream.IN, 5.0, (1,)),
        Work(Stream.COMPUTE, 1.0, (3,)),
    ]
    assert run(works, link) == pytest.approx([1.0, 3.0, 2.0, 4.0, 5.0])


def test_both_directions_share_what_the_host_can_do() -> None:
    link = Link(out_bytes_s=10.0, in_bytes_s=10.0, both_bytes_s=10.0)
    assert run([Work(Stream.OUT, 10.0), Work(Stream.IN, 20.0)], link) == pytest.approx([2.0, 3.0])


def test_every_copy_pays_the_latency() -> None:
    link = Link(out_bytes_s=10.0, in_bytes_s=10.0, latency_s=0.5)
    assert run([Work(Stream.OUT, 10.0), Work(Stream.OUT, 10.0)], link) == pytest.approx([1.5, 3.0])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_a_link_as_the_planners_believe_it_gives_their_times(alpha: float) -> None:
    task = small()
    policy = uniform(task, kept=(0, 0, 0, 0), swapped=(1, 1, alpha, alpha))
    link = Link(out_bytes_s=task.d2h_bytes_s, in_bytes_s=task.h2d_bytes_s)
    expected = replay(task, policy)
    found = simulate(task, policy, link)
    assert found.total_s == pytest.approx(expected.total_s, rel=1e-6)
    assert found.stall_s == pytest.approx(expected.stall_s, abs=1e-6 * expected.total_s)


def test_swapping_stalls_on_a_slow_link_only() -> None:
    task = small()
    policy = uniform(task, kept=(0, 0, 0, 0), swapped=(1, 1, 1, 1))
    assert simulate(task, policy, FAST).stall_s == pytest.approx(0.0, abs=1e-6)
    slow = Link(out_bytes_s=task.d2h_bytes_s / 4, in_bytes_s=task.h2d_bytes_s / 4)
    found = simulate(task, policy, slow)
    assert found.stall_s > found.compute_s


def test_what_is_recomputed_takes_time_and_no_link() -> None:
    task = small()
    policy = uniform(task, kept=(0, 0, 0, 0), swapped=(1, 1, 0, 0))
    again = sum(group.recompute_s or 0.0 for group in task.groups)
    found = simulate(task, policy, FAST)
    assert found.recompute_s == pytest.approx(4 * again), "the last two layers stay as they are"
    assert found.total_s == pytest.approx(found.compute_s + found.recompute_s, rel=1e-6)
