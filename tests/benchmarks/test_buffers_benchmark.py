"""The buffer benchmark measures what it says: instances without room to spare, traces that keep their lifetimes."""

import pytest

from benchmarks.buffer_traces import steps
from benchmarks.buffers import CAPACITY, RECIPES, instance
from distrain.planners.buffers.bounds import max_live


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
