"""The bounds hold: tiny instances of which every plan was looked at, told as much as could lead them astray."""

import pytest

from benchmarks.sequence_exhaustive import best_plan_ms, best_wave_ms
from benchmarks.sequence_lengths import draw
from benchmarks.sequence_planner import tiny
from distrain.planners.sequence import SequenceCost, load_cost, plan_step
from distrain.planners.sequence import milp as flexsp
from distrain.planners.sequence.bound import certify
from distrain.planners.sequence.buckets import buckets, enough_buckets
from distrain.planners.sequence.length_classes import LengthClasses
from distrain.planners.sequence.problem import StepProblem
from distrain.planners.sequence.timeline import asynchronous_bound_ms

VARIANTS = (
    {"integers": 99},
    {"integers": 2},
    {"integers": 0, "ratio": 1.5},
    {"most": 3},
    {"most": 1, "ratio": 1.4},
)


@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_no_bound_is_above_the_best_plan(variant: int) -> None:
    options = dict(VARIANTS[variant])
    most = int(options.pop("most", 100))
    for seed in range(variant, 50, len(VARIANTS)):
        lengths, num_slots, cost = tiny(1000 + seed)
        best_ms = best_plan_ms(lengths, num_slots=num_slots, cost=cost)
        problem = StepProblem.of(lengths, num_slots=num_slots, cost=cost)
        assert problem.area_bound_ms <= best_ms * (1 + 1e-9)
        assert asynchronous_bound_ms(problem) <= best_ms * (1 + 1e-9)
        for known in (1.0, 1.5):  # the true optimum as the known plan; and room to be wrong above it
            found = certify(
                problem,
                estimated_ms=known * best_ms,
                num_waves=1 + seed % 3,
                seconds=0.3,
                classes=LengthClasses.of(problem, most=most),
                accuracy=1e-4,
                **options,  # type: ignore[arg-type]
            )
            assert found.bound_ms <= best_ms * (1 + 1e-6), (seed, known)
            assert found.bound_ms >= problem.area_bound_ms * (1 - 1e-9)


def test_a_certificate_proves_more_than_the_area() -> None:
    cost, lengths = load_cost("7b"), [6000] * 17  # one too many for one micro-batch of 16 devices
    plain = plan_step(lengths, num_slots=16, cost=cost)
    proven = plan_step(lengths, num_slots=16, cost=cost, certify_s=4.0)
    assert plain.lower_bound_ms * 1.05 < proven.lower_bound_ms <= proven.estimated_ms
    assert "column generation" in proven.reasons[-1]


@pytest.mark.parametrize(
    ("beta1", "bandwidth_gb_s", "lengths"),
    [(0.0, {2: 49.0, 4: 137.0}, [2000, 333]), (5.0, {}, [400] * 13), (0.0, {}, [400] * 13)],
)
def test_sequences_that_take_no_time_are_bounded_all_the_same(
    beta1: float, bandwidth_gb_s: dict[int, float], lengths: list[int]
) -> None:
    cost = SequenceCost(
        alpha1=0.0,
        alpha2=0.0,
        beta1=beta1,
        layers=1,
        hidden=64,
        tokens_per_gpu=1000,
        bandwidth_gb_s=bandwidth_gb_s,
    )
    problem = StepProblem.of(lengths, num_slots=5, cost=cost)
    plan = plan_step(lengths, num_slots=5, cost=cost)
    found = certify(problem, estimated_ms=1.2 * plan.estimated_ms, num_waves=1, seconds=1.0)
    assert problem.area_bound_ms * (1 - 1e-9) <= found.bound_ms <= plan.estimated_ms * (1 + 1e-6)


def test_only_a_proof_makes_a_plan_optimal() -> None:
    cost = load_cost("7b")
    one = plan_step([64_000], num_slots=16, cost=cost, certify_s=2.0)
    many = plan_step(draw("pareto", 103), num_slots=64, cost=cost)
    assert (one.status, many.status) == ("optimal", "feasible")
    assert one.gap == pytest.approx(0, abs=1e-6)


def test_merged_classes_keep_every_sequence_and_only_shorten() -> None:
    problem = StepProblem.of(draw("stdlib", 1), num_slots=64, cost=load_cost("7b"))
    merged = LengthClasses.of(problem, most=20)
    assert (len(merged.lengths), merged.counts.sum()) == (20, 512)
    assert merged.lengths @ merged.counts <= problem.lengths.sum()
    assert merged.count(problem.lengths).tolist() == merged.counts.tolist()


def test_the_exact_program_finds_the_best_wave() -> None:
    solved = 0
    for seed in range(30):
        lengths, num_slots, cost = tiny(2000 + seed)
        best_ms = best_wave_ms(lengths, num_slots=num_slots, cost=cost)
        if best_ms < float("inf"):
            problem = StepProblem.of(lengths, num_slots=num_slots, cost=cost)
            wave, solution = flexsp.wave(problem, range(len(lengths)), seconds=10.0, exact=True)
            assert wave.ms == pytest.approx(best_ms)
            assert solution.status == "optimal"
            solved += 1
    assert solved > 5


def test_buckets_have_the_least_over_estimate() -> None:
    lengths = [5, 1, 9, 2, 9, 4, 7, 30]

    def waste(cuts: tuple[int, ...]) -> int:
        ordered, ends = sorted(lengths), (*cuts, len(lengths))
        parts = [ordered[begin:end] for begin, end in zip((0, *cuts), ends, strict=True)]
        return sum(part[-1] * len(part) - sum(part) for part in parts)

    least = min(waste((a, b)) for a in range(1, 8) for b in range(a + 1, 8))
    found = buckets(lengths, 3)
    assert sorted(each for bucket in found for each in bucket) == list(range(8))
    assert sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in found) == least


def test_buckets_become_finer_where_memory_is_short() -> None:
    lengths = [float(length) for length in draw("log-normal", 4, num=50)]
    roomy, tight = (len(enough_buckets(lengths, factor * sum(lengths))) for factor in (2.0, 1.001))
    assert roomy < tight <= 50
