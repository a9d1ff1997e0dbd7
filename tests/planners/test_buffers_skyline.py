"""The complete search: right on everything small, natively and in Python, and its no is a proof."""

import time

import pytest
from hypothesis import given, settings

from distrain.planners.buffers import Buffer, violations
from distrain.planners.buffers.bounds import max_live, sections
from distrain.planners.buffers.engine import PYTHON, Engine, engine
from distrain.planners.buffers.greedy import portfolio
from distrain.planners.buffers.skyline import luby
from helpers.buffers import PINWHEEL, TOO_TALL, any_buffers, buffers, lowest_peak, perfect

NATIVE = engine(build=True)
both = pytest.mark.parametrize("search", [NATIVE, PYTHON], ids=["native", "python"])


def test_the_native_engine_is_there() -> None:
    assert NATIVE.library is not None, NATIVE.lacking


@both
def test_answers_agree_with_trying_everything(search: Engine) -> None:
    @given(any_buffers(most=6))
    @settings(derandomize=True, deadline=None, database=None, max_examples=150)
    def agree(buffers: tuple[Buffer, ...]) -> None:
        cut, best = sections(buffers), lowest_peak(buffers)
        for capacity in range(cut.max_live - 1, best + 2):
            found = search.fit(cut, capacity=capacity, seed=capacity, max_seconds=30)
            assert found.fits is (capacity >= best)
            if found.fits:
                ends = [at + each.size for at, each in zip(found.offsets, buffers, strict=True)]
                assert not violations(buffers, found.offsets, peak=max(ends), capacity=capacity)

    agree()


@both
def test_a_pinwheel_fits_without_a_byte_to_spare(search: Engine) -> None:
    found = search.fit(sections(PINWHEEL), capacity=5, seed=1, max_seconds=30)
    assert found.fits
    assert not violations(PINWHEEL, found.offsets, peak=5)


@both
def test_what_cannot_fit_is_proven(search: Engine) -> None:
    cut = sections(TOO_TALL)
    assert cut.max_live == 6
    assert lowest_peak(TOO_TALL) == 7
    assert search.fit(cut, capacity=6, seed=0, max_seconds=30).fits is False
    assert search.fit(cut, capacity=7, seed=0, max_seconds=30).fits is True


@pytest.mark.parametrize("seed", range(5))
def test_packings_without_a_gap_are_found_at_any_seed(seed: int) -> None:
    buffers = perfect(150, seed)
    cut = sections(buffers)
    found = NATIVE.fit(cut, capacity=4096, seed=seed, max_seconds=60)
    assert found.fits
    assert not violations(buffers, found.offsets, peak=4096)
    assert portfolio(cut, NATIVE, target=4096, deadline=time.monotonic() + 60).peak > 4096


def test_the_same_seed_searches_the_same_way() -> None:
    cut = sections(perfect(200, 3))
    first, again = (NATIVE.fit(cut, capacity=4096, seed=5, max_seconds=60) for _ in range(2))
    assert first == again


@both
def test_a_limit_of_nodes_leaves_it_undecided(search: Engine) -> None:
    cut = sections(perfect(60, 1))
    found = search.fit(cut, capacity=4096, seed=0, max_nodes=5, max_seconds=60)
    assert found.fits is None
    assert found.offsets == ()


def test_python_searches_larger_problems_too() -> None:
    buffers = perfect(40, 2)
    found = PYTHON.fit(sections(buffers), capacity=4096, seed=0, max_seconds=60)
    assert found.fits
    assert not violations(buffers, found.offsets, peak=4096)


@both
def test_any_number_of_buffers_may_be_put_down_in_one_descent(search: Engine) -> None:
    cut = sections(chain := buffers(*((start, start + 2, 1 + start % 3) for start in range(520))))
    found = search.fit(cut, capacity=20, seed=0, max_nodes=20_000, max_seconds=600)
    assert found.fits
    assert not violations(
        chain,
        found.offsets,
        peak=max(at + each.size for at, each in zip(found.offsets, chain, strict=True)),
        capacity=20,
    )


@given(any_buffers(most=12, most_time=20, most_size=9))
@settings(derandomize=True, deadline=None, database=None, max_examples=100)
def test_both_engines_put_buffers_down_alike(buffers: tuple[Buffer, ...]) -> None:
    cut = sections(buffers)
    order = cut.size.argsort(kind="stable").astype("int32")
    for best in (False, True):
        peak, offsets = NATIVE.first_fit(cut, order, best=best)
        also, alike = PYTHON.first_fit(cut, order, best=best)
        assert (peak, offsets.tolist()) == (also, alike.tolist())
        assert not violations(buffers, offsets.tolist(), peak=peak)


@given(any_buffers(most=10, most_time=12))
@settings(derandomize=True, deadline=None, database=None, max_examples=100)
def test_sections_keep_who_meets_whom_and_the_largest_load(buffers: tuple[Buffer, ...]) -> None:
    cut = sections(buffers)
    for i, one in enumerate(buffers):
        for j, other in enumerate(buffers):
            assert one.meets(other) == (cut.lower[i] < cut.upper[j] and cut.lower[j] < cut.upper[i])
    load, start, end = max_live(buffers)
    moments = range(21)
    loads = [sum(each.size for each in buffers if each.lower <= t < each.upper) for t in moments]
    assert load == cut.max_live == max(loads)
    assert all(loads[t] == load for t in range(start, end))


def test_budgets_are_lubys() -> None:
    assert [luby(index) for index in range(15)] == [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8]
