"""Failpoints: silent unless armed, exact about which hit fires, and never left armed."""

import threading
from collections.abc import Mapping
from typing import Any

import pytest

from distrain.core.failpoints import FAILPOINTS, Failpoints, hit


def test_an_unarmed_point_does_nothing() -> None:
    assert hit("checkpoint.write", rank=0, path="x") is None
    assert FAILPOINTS.names() == []


def test_an_armed_point_raises_on_the_hit_waited_for_and_never_again() -> None:
    points = Failpoints()
    with points.armed("write", OSError("full"), on_hit=3) as point:
        points.hit("write")
        points.hit("write")
        assert not point.fired
        with pytest.raises(OSError, match="full"):
            points.hit("write")
        points.hit("write")
        assert point.fired
        assert point.hits == 4


def test_a_callback_receives_the_context_of_its_hit() -> None:
    points, seen = Failpoints(), []

    def see(context: Mapping[str, Any]) -> None:
        seen.append(dict(context))

    points.arm("send", see)
    points.hit("send", rank=3, name="x")
    assert seen == [{"rank": 3, "name": "x"}]


def test_only_hits_with_the_wanted_context_count() -> None:
    points = Failpoints()
    point = points.arm("step", RuntimeError("now"), on_hit=2, rank=1, step=5)
    points.hit("step", rank=0, step=5)
    points.hit("step", rank=1, step=4)
    points.hit("step")
    points.hit("step", rank=1, step=5)
    assert point.hits == 1
    with pytest.raises(RuntimeError, match="now"):
        points.hit("step", rank=1, step=5, more=True)


def test_the_block_disarms_even_when_the_fault_goes_through_it() -> None:
    points = Failpoints()
    with pytest.raises(ValueError, match="boom"), points.armed("a", ValueError("boom")):
        assert points.names() == ["a"]
        points.hit("a")
    assert points.names() == []
    points.hit("a")


def test_names_lists_what_a_test_left_armed() -> None:
    points = Failpoints()
    points.arm("b", OSError())
    points.arm("a", OSError())
    assert points.names() == ["a", "b"]
    points.disarm("b")
    points.disarm("never armed")
    assert points.names() == ["a"]


def test_arming_twice_or_for_the_zeroth_hit_is_refused() -> None:
    points = Failpoints()
    points.arm("a", OSError())
    with pytest.raises(ValueError, match="armed already"):
        points.arm("a", OSError())
    with pytest.raises(ValueError, match="counts from 1"):
        points.arm("b", OSError(), on_hit=0)
    assert points.names() == ["a"]


def test_of_many_threads_exactly_one_meets_the_fault() -> None:
    points, caught = Failpoints(), []
    points.arm("race", OSError("mine"), on_hit=500)

    def run() -> None:
        for _ in range(250):
            try:
                points.hit("race")
            except OSError as error:
                caught.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caught) == 1


def test_a_point_may_be_armed_for_every_hit() -> None:
    points, seen = Failpoints(), []
    point = points.arm("write", lambda context: seen.append(context["n"]), on_hit=None, rank=1)
    for n in range(4):
        points.hit("write", n=n, rank=n % 2)
    assert seen == [1, 3]
    assert point.fired
