"""Scenarios from files and overrides: all problems at once, in words that help."""

from pathlib import Path
from typing import Any

import pytest

from distrain.core.errors import ConfigError
from distrain.faults.simulate import Scenario, Shows, Survives, load_scenario

EXAMPLES = sorted((Path(__file__).parent.parent.parent / "examples/simulate").glob("*.toml"))


def problems(**overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_scenario(overrides={key.replace("__", "."): value for key, value in overrides.items()})
    return str(caught.value)


def test_nothing_given_is_llama_3() -> None:
    assert load_scenario() == Scenario()
    assert Scenario().num_nodes == 2048


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_load(path: Path) -> None:
    assert load_scenario(path).job.gpus >= 16_384


def test_the_example_of_llama_3_says_what_the_defaults_are() -> None:
    (path,) = (path for path in EXAMPLES if path.stem == "llama3")
    scenario = load_scenario(path, overrides={"job.days": 30.0})
    assert scenario == load_scenario()


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(
        """
        job = {gpus = 64, days = 3}
        checkpoint.interval_s = 600
        [[failures.classes]]
        name = "fan"
        per_1000_node_days = 2
        shows = "hang"
        [[checkpoint.levels]]
        name = "parity"
        survives = "nodes"
        restore_s = 3
        max_lost = 2
        """
    )
    scenario = load_scenario(path, overrides={"job.gpus": 128, "failures.scale": 3})
    assert (scenario.job.gpus, scenario.job.days) == (128, 3.0)
    assert scenario.checkpoint.interval_s == 600.0
    (fan,) = scenario.classes
    assert (fan.shows, fan.per_1000_node_days) == (Shows.HANG, 6.0)
    (parity,) = scenario.checkpoint.levels
    assert (parity.survives, parity.max_lost, parity.every) == (Survives.NODES, 2, 1)


def test_all_problems_are_listed_at_once() -> None:
    text = problems(
        job__gpu=8,
        job__days="long",
        failures__mix="lama3",
        failures__correlated=1.5,
        recovery__restart_s=-1,
        checkpoint__interval_s="often",
        checkpoint__levels=[{"name": "disk", "survives": "fire"}, 7],
        nothing=1,
    )
    for expected in (
        "there is no job.gpu\n",
        "try: job.gpus\n",
        "job.days has the wrong type",
        "got: lama3",
        "try: llama3",
        "failures.correlated is out of range",
        "recovery.restart_s is out of range",
        "checkpoint.interval_s has the wrong type",
        "checkpoint.levels is not an array of tables",
        "there is no nothing",
    ):
        assert expected in text


def test_what_is_wrong_in_a_list_is_named_by_its_place() -> None:
    good = {"name": "a", "survives": "all", "restore_s": 1}
    text = problems(checkpoint__levels=[good, {"name": "b", "survives": "fire", "every_": 1}])
    assert "checkpoint.levels[1].survives knows no such choice" in text
    assert "checkpoint.levels[1] lacks restore_s" in text
    assert "try: checkpoint.levels[1].every" in text
    text = problems(checkpoint__levels=[good, {**good, "every": 0}])
    assert "checkpoint.levels[1].every is out of range" in text
    assert "two of checkpoint.levels have the same name" in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"job__gpus": 100}, "the GPUs do not fill whole nodes"),
        ({"job__gpus_per_node": 0}, "job.gpus_per_node is out of range"),
        ({"job": 3}, "job is a table, not a value"),
        ({"job__gpus": True}, "job.gpus has the wrong type"),
        ({"job__days": float("nan")}, "job.days has the wrong type"),
        ({"failures__burstiness": 0}, "failures.burstiness is out of range"),
        ({"failures__scale": 1e9}, "there are too many failures to simulate"),
        ({"failures__trace": "nowhere.jsonl"}, "the trace is no file"),
        ({"checkpoint__levels": []}, "there is no level to save at"),
        ({"checkpoint__interval_s": 0}, "checkpoint.interval_s is too short"),
    ],
)
def test_what_cannot_be_is_refused(overrides: dict[str, Any], expected: str) -> None:
    assert expected in problems(**overrides)


def test_saves_faster_than_a_level_takes_them_are_refused() -> None:
    level = {"name": "disk", "survives": "all", "restore_s": 1, "delay_s": 100, "every": 4}
    text = problems(checkpoint__levels=[level], checkpoint__interval_s=20)
    assert "25 or more" in text


@pytest.mark.parametrize(("text", "expected"), [("job = [", "not valid TOML"), (None, "cannot be read")])
def test_a_file_that_cannot_be_read_says_so(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "scenario.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_scenario(path)
