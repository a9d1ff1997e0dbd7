"""The buffer benchmark measures what it says: instances without room to spare, traces that keep their lifetimes."""

import pytest

from benchmarks.buffer_traces import steps
from benchmarks.buffers import CAPACITY, RECIPES, Recipe, instance
from distrain.planners.buffers import violations
from distrain.planners.buffers.bounds import max_live, sections
from distrain.planners.buffers.engine import engine


def test_instances_hold_at_their_worst_moment_just_what_fits() -> None:
    for recipe in RECIPES:
        buffers = instance(recipe)
        assert len(buffers) == recipe.num
        assert 180 <= recipe.num <= 450
        assert max_live(buffers)[0] == CAPACITY


def test_an_instance_is_the_same_each_time() -> None:
    assert instance(RECIPES[3]) == instance(RECIPES[3])
    assert len({instance(recipe) for recipe in RECIPES}) == len(RECIPES)


def test_the_quick_trace_is_a_training_step() -> None:
    ((name, make),) = steps(quick=True)
    buffers = make()
    assert "4 layers" in name
    assert len(buffers) > 150
    load, start, end = max_live(buffers)
    middle = max(each.upper for each in buffers) / 2
    assert load > 0
    assert start < middle < max(each.upper for each in buffers)
    assert start == pytest.approx(end, abs=20)


def test_a_few_gaps_do_not_lead_the_search_astray() -> None:
    """A twentieth of the pieces is missing. Blind to what cannot lie below a buffer, 100,000 nodes are not enough."""
    buffers = instance(Recipe(180, 0.2, 4.0, 0.05, 0.0, 1002))
    for seed in range(3):
        found = engine(build=True).fit(
            sections(buffers), capacity=CAPACITY, seed=seed, max_nodes=20_000, max_seconds=600
        )
        assert found.fits
        assert not violations(buffers, found.offsets, peak=CAPACITY, capacity=CAPACITY)
