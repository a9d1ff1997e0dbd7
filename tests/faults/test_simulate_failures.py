"""Failures as drawn: rates, shapes, repeat offenders, racks; traces; the published mixes."""

import json
from pathlib import Path

import numpy as np
import pytest

from distrain.core.errors import ConfigError
from distrain.faults.simulate import FailureClass, FailureProcess, Failures, Shows, draw
from distrain.faults.simulate.failures import DAY_S
from distrain.faults.simulate.mixes import MIXES
from distrain.faults.simulate.trace import read_trace, write_trace

CLASSES = (
    FailureClass(name="gpu", per_1000_node_days=6.0, node_share=1.0),
    FailureClass(name="bug", per_1000_node_days=2.0),
    FailureClass(name="timeout", per_1000_node_days=2.0, node_share=0.5, shows=Shows.HANG),
)


def drawn(
    *,
    seed: int = 0,
    num_nodes: int = 1000,
    days: float = 1000.0,
    burstiness: float = 1.0,
    frailty: float = 0.0,
) -> Failures:
    process = FailureProcess(classes=CLASSES, burstiness=burstiness, frailty=frailty)
    return draw(process, num_nodes=num_nodes, horizon_s=days * DAY_S, seed=seed)


def variation(t_s: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    gaps = np.diff(t_s)
    return float(gaps.std() / gaps.mean())


def test_the_same_seed_draws_the_same_failures_and_another_one_others() -> None:
    first, again, other = drawn(frailty=1.0), drawn(frailty=1.0), drawn(frailty=1.0, seed=1)
    for name in ("t_s", "node", "kind", "repair_s"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.t_s[:10], other.t_s[:10])


@pytest.mark.parametrize(("burstiness", "frailty"), [(1.0, 0.0), (2.0, 0.0), (0.5, 0.0), (1.0, 2.0)])
def test_the_rate_is_kept_whatever_the_shape(burstiness: float, frailty: float) -> None:
    failures = drawn(burstiness=burstiness, frailty=frailty)
    assert len(failures) == pytest.approx(10_000, rel=0.06)
    assert np.all(np.diff(failures.t_s) >= 0)
    assert 0 <= failures.t_s[0] <= failures.t_s[-1] < 1000 * DAY_S


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 1.76])
def test_gaps_vary_as_much_as_asked(burstiness: float) -> None:
    assert variation(drawn(burstiness=burstiness).t_s) == pytest.approx(burstiness, rel=0.06)


def test_bursts_do_not_gather_at_the_beginning() -> None:
    early = [int((drawn(seed=seed, days=10, burstiness=3.0).t_s < DAY_S).sum()) for seed in range(200)]
    assert np.mean(early) == pytest.approx(10, rel=0.25)


def test_frailty_makes_repeat_offenders() -> None:
    """The variance of a node's count is its mean, and with frailty v its square times v in addition."""
    even, frail = (np.bincount(drawn(frailty=frailty).node, minlength=1000) for frailty in (0.0, 1.5))
    assert even.var() == pytest.approx(even.mean(), rel=0.2)
    assert frail.var() == pytest.approx(frail.mean() + 1.5 * frail.mean() ** 2, rel=0.25)
    assert frail.max() > 3 * even.max()


def test_classes_come_in_their_shares_and_take_the_node_as_often_as_they_should() -> None:
    failures = drawn()
    assert np.bincount(failures.kind) / len(failures) == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
    lost = [float((failures.repair_s[failures.kind == kind] > 0).mean()) for kind in range(3)]
    assert lost == pytest.approx([1.0, 0.0, 0.5], abs=0.03)


def test_repair_times_have_the_quantiles_of_the_published_data() -> None:
    repair_s = drawn().repair_s
    median, p90 = np.quantile(repair_s[repair_s > 0], [0.5, 0.9]) / DAY_S
    assert median == pytest.approx(0.85, rel=0.1)
    assert p90 == pytest.approx(13.0, rel=0.15)


def test_a_correlated_failure_takes_the_whole_rack_at_once() -> None:
    process = FailureProcess(classes=CLASSES[:1], correlated=0.3, rack_nodes=4)
    failures = draw(process, num_nodes=1002, horizon_s=500 * DAY_S, seed=0)
    times, counts = np.unique(failures.t_s, return_counts=True)
    assert float((counts > 1).mean()) == pytest.approx(0.3, abs=0.04)
    assert len(times) == pytest.approx(3000, rel=0.06)
    for t_s in times[counts > 1]:
        racks = failures.node[failures.t_s == t_s] // 4
        assert len(set(racks)) == 1
        assert len(racks) == (2 if racks[0] == 250 else 4)  # the last rack is not full
        assert np.all(failures.repair_s[failures.t_s == t_s] > 0)


def test_nothing_fails_at_a_rate_of_zero() -> None:
    quiet = (FailureClass(name="never", per_1000_node_days=0.0),)
    assert len(draw(FailureProcess(classes=quiet), num_nodes=8, horizon_s=DAY_S, seed=0)) == 0


def test_the_mix_of_llama_3_has_the_published_counts() -> None:
    counts = {each.name: each.per_1000_node_days / 1000 * 54 * 2048 for each in MIXES["llama3"]}
    assert sum(counts.values()) == pytest.approx(466)
    assert sum(counts.values()) - counts["planned"] == pytest.approx(419)
    assert counts["faulty_gpu"] == pytest.approx(148)


def test_the_mix_of_c4_crashes_forty_times_a_month_and_mostly_confined_to_a_node() -> None:
    rates = np.array([each.per_1000_node_days for each in MIXES["c4"]])
    assert rates.sum() / 1000 * 30 * 512 == pytest.approx(40)
    shares = np.array([each.node_share for each in MIXES["c4"]])
    assert (rates * shares).sum() / rates.sum() == pytest.approx(0.825, abs=0.005)


@pytest.mark.parametrize(("mix", "rate"), [("byterobust", 2.3), ("megascale", 3.1)])
def test_the_other_mixes_have_their_stated_rates(mix: str, rate: float) -> None:
    assert sum(each.per_1000_node_days for each in MIXES[mix]) == pytest.approx(rate, abs=0.01)


def test_a_trace_that_is_written_reads_back_the_same(tmp_path: Path) -> None:
    failures = drawn(num_nodes=50, days=300)
    write_trace(tmp_path / "trace.jsonl", failures)
    read = read_trace(tmp_path / "trace.jsonl", known=CLASSES, num_nodes=50)
    assert len(read) == len(failures) > 50
    for name in ("t_s", "node", "repair_s"):
        assert np.array_equal(getattr(read, name), getattr(failures, name))
    assert [read.classes[kind] for kind in read.kind] == [failures.classes[kind] for kind in failures.kind]


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_trace_may_be_unsorted_name_its_nodes_and_know_its_own_classes(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "trace.jsonl",
        {"t_s": 50, "node": "rack2-n7", "class": "comm_hang"},
        "",
        {"t_s": 20, "node": "rack1-n1", "class": "fan", "repair_s": 9},
        {"t_s": 90, "node": "rack2-n7", "class": "planned"},
        {"t_s": 1e6, "node": "rack2-n7", "class": "too late"},
    )
    read = read_trace(path, known=(), num_nodes=2, horizon_s=100)
    assert read.t_s.tolist() == [20, 50, 90]
    assert read.node.tolist() == [1, 0, 0]
    assert read.repair_s.tolist() == [9, 0, 0]
    shows = [read.classes[kind].shows for kind in read.kind]
    assert shows == [Shows.CRASH, Shows.HANG, Shows.PLANNED]


def test_every_bad_line_of_a_trace_is_named(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "trace.jsonl",
        "not json",
        "[1]",
        {"t_s": -1, "node": 0, "class": "a"},
        {"t_s": 1, "node": 0, "class": "a", "repair": 3},
        {"t_s": 1, "node": 0},
        {"t_s": 1, "node": 77, "class": "a"},
        {"t_s": 1, "node": 0, "class": "a"},
    )
    with pytest.raises(ConfigError) as caught:
        read_trace(path, known=(), num_nodes=8)
    text = str(caught.value)
    assert len(caught.value.problems) == 6
    assert all(f"{path}:{number}:" in text for number in range(1, 6))
    assert "[77]" in text


def test_a_trace_with_very_many_bad_lines_is_cut_short(tmp_path: Path) -> None:
    path = lines(tmp_path / "trace.jsonl", *["broken"] * 500)
    with pytest.raises(ConfigError, match="a line of the trace is not JSON") as caught:
        read_trace(path, known=(), num_nodes=8)
    assert len(caught.value.problems) == 11
    assert "490 more" in str(caught.value)


def test_a_trace_that_names_more_nodes_than_there_are_is_refused(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "trace.jsonl", *({"t_s": 1, "node": f"n{number}", "class": "a"} for number in range(9))
    )
    with pytest.raises(ConfigError, match="more nodes than the job has"):
        read_trace(path, known=(), num_nodes=8)


def test_a_trace_that_is_not_there_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl", known=(), num_nodes=8)
