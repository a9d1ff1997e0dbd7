"""Which requests of recorded steps are planned, and what a plan may say."""

import subprocess
import sys

import pytest

from distrain.activation.allocator import AllocationPlan, Request, plan_requests
from distrain.activation.allocator.plan import Place, buffers_of, one_step
from distrain.core.errors import ConfigError
from distrain.planners.buffers import violations


def request(size: int, born: int, died: int | None, phase: int = 0) -> Request:
    return Request(phase=phase, size=size, born=born, died=died)


def test_blocks_that_never_meet_share_addresses_and_the_peak_is_the_bound() -> None:
    requests = [request(1000, 0, 2), request(500, 1, 5), request(1000, 3, 6)]
    plan = plan_requests(requests, alignment=64)
    assert plan.arena_bytes == plan.lower_bound_bytes == 1024 + 512
    offsets = [place.offset for place in plan.places]
    assert offsets[0] == offsets[2] != offsets[1]
    placed = [offset for offset in offsets if offset is not None]
    top = max(offset + each.size for offset, each in zip(placed, requests, strict=True))
    assert top <= plan.arena_bytes
    assert not violations(buffers_of(requests), placed, peak=top)


def test_what_never_dies_is_expected_but_has_no_place() -> None:
    plan = plan_requests([request(1000, 0, None), request(500, 1, 5)], alignment=64)
    assert [place.offset for place in plan.places] == [None, 0]
    assert plan.arena_bytes == 512


def test_of_two_steps_the_first_is_planned_and_the_second_shows_what_crosses_the_border() -> None:
    first = [
        request(100, 0, 1),  # dies at once
        request(200, 2, 11),  # a gradient, freed at the start of the next step
        request(300, 3, 15),  # still alive when the next step asks for its own
        request(400, 4, None),  # never dies
    ]
    second = [request(100, 10, 12), request(200, 13, None), request(300, 14, None), request(400, 16, None)]
    chosen = one_step([first, second])
    assert [(each.born, each.died) for each in chosen] == [(0, 1), (0, 10), (3, None), (4, None)]
    places = plan_requests(chosen, alignment=64).places
    assert [place.offset is None for place in places] == [False, False, True, True]


def test_phases_are_told_apart_when_steps_are_compared() -> None:
    first = [request(100, 0, 6, phase=1), request(100, 1, 9, phase=2)]
    second = [request(100, 5, None, phase=2), request(100, 8, None, phase=1)]
    assert [each.died for each in one_step([first, second])] == [5, None]


def test_nothing_recorded_is_a_plan_of_nothing() -> None:
    plan = plan_requests(one_step([]), alignment=64)
    assert (plan.places, plan.arena_bytes) == ((), 0)


def test_a_plan_lists_all_that_is_wrong_with_it() -> None:
    places = (
        Place(phase=-1, size=100, offset=0),
        Place(phase=0, size=10, offset=None),
        Place(phase=0, size=100, offset=1000),
        Place(phase=0, size=100, offset=3),
    )
    with pytest.raises(ConfigError) as caught:
        AllocationPlan(places=places, arena_bytes=1024, lower_bound_bytes=0, min_bytes=64, alignment=64)
    text = str(caught.value)
    assert all(word in text for word in ("possible phase", "too small", "leaves the arena", "not aligned"))


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys, distrain.activation.allocator as a; a.plan_requests; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=150)
