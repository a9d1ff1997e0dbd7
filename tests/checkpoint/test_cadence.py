"""How often a run saves: every so many steps, or as Young and Daly advise for what is measured."""

import math
from itertools import pairwise

import pytest

from distrain.checkpoint.cadence import Auto, Cadence
from distrain.checkpoint.interval import interval_s, optimal_interval_s
from distrain.core.errors import ConfigError

STEP_S, HOUR_S = 2.0, 3600.0


def saved_steps(
    auto: Auto, *, stall_s: float, flush_s: float = 0.0, num_nodes: int = 1, steps: int = 20_000
) -> list[int]:
    cadence = Cadence(auto, num_nodes=num_nodes, num_slots=3)
    now, stalled_s, saved = 0.0, 0.0, []
    for step in range(1, steps):
        now += STEP_S
        if cadence.is_due(step, now=now):
            saved.append(step)
            stalled_s += stall_s
            cadence.saved(step, stalled_s=stalled_s, flush_s=lambda: flush_s, agree=lambda mine: [mine])
    return saved


def test_a_number_saves_its_multiples() -> None:
    cadence = Cadence(3, num_nodes=1, num_slots=3)
    assert [step for step in range(1, 10) if cadence.is_due(step, now=0.0)] == [3, 6, 9]


@pytest.mark.parametrize(("stall_s", "num_nodes"), [(0.05, 1), (0.05, 2048), (1.0, 256)])
def test_the_distance_is_the_optimum_of_young_and_daly(stall_s: float, num_nodes: int) -> None:
    auto = Auto(node_mtbf_h=1000.0, overhead=0.5)
    saved = saved_steps(auto, stall_s=stall_s, num_nodes=num_nodes)
    young_s = math.sqrt(2 * stall_s * 1000 * HOUR_S / num_nodes)
    assert saved[:2] == [1, 2]  # to see what a save and what a step cost
    for one, two in pairwise(saved[2:]):
        assert (two - one) * STEP_S == pytest.approx(young_s, rel=0.1, abs=STEP_S)


def test_the_budget_and_the_disk_make_saves_rarer_than_the_optimum() -> None:
    tight = saved_steps(Auto(node_mtbf_h=0.1, overhead=0.01), stall_s=1.0)
    assert {two - one for one, two in pairwise(tight[2:])} == {50}  # 1 s in 100 s
    slow = saved_steps(Auto(node_mtbf_h=0.1, overhead=0.5), stall_s=0.001, flush_s=240.0)
    assert {two - one for one, two in pairwise(slow[2:])} == {60}  # two slots, 240 s each


def test_the_slowest_rank_decides_for_all() -> None:
    asked: list[list[float]] = []

    def agree(mine: list[float]) -> list[list[float]]:
        asked.append(mine)
        return [mine, [8.0, 4.0, 0.0]]

    cadence = Cadence(Auto(node_mtbf_h=0.01, overhead=0.1), num_nodes=1, num_slots=3)
    assert cadence.is_due(1, now=0.0)
    cadence.saved(1, stalled_s=1.0, flush_s=lambda: 0.0, agree=agree)
    assert asked == [[0.0, 1.0, 0.0]]
    assert [step for step in range(2, 9) if cadence.is_due(step, now=float(step))] == [6, 7, 8]  # 4 s in 40 s


def test_dalys_estimate_ends_where_a_save_takes_longer_than_failures_need() -> None:
    assert optimal_interval_s(stall_s=10.0, mtbf_s=5.0) == 5.0
    assert interval_s(stall_s=10.0, mtbf_s=5.0, flush_s=0.0, num_slots=2, budget=0.5) == 20.0


@pytest.mark.parametrize("wrong", [{"overhead": 0.0}, {"overhead": 1.0}, {"node_mtbf_h": 0.0}])
def test_what_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="automatic interval"):
        Auto(**wrong)
    with pytest.raises(ConfigError, match="so often"):
        Cadence(0, num_nodes=1, num_slots=3)
