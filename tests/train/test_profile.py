"""``distrain doctor --profile``: real ranks are timed on groups of every degree, and a cost model is written."""

import json
import tomllib
from pathlib import Path

import pytest

from distrain.cli import main
from distrain.core.errors import DataError
from distrain.core.load import load as load_run
from distrain.core.vocabulary import PRESETS
from distrain.planners.sequence.cost import SequenceCost, load
from distrain.planners.sequence.fit import Sample
from distrain.train.prepare import prepare
from distrain.train.sequences.profile import Profile, degrees, rows, shapes

COST = SequenceCost(
    alpha1=1e-5, alpha2=0.1, beta1=5.0, layers=2, hidden=128, tokens_per_gpu=900, bandwidth_gb_s={2: 0.5}
)
PROFILE = Profile(
    samples=tuple(
        Sample(lengths, degree, COST.group_ms(lengths, degree))
        for degree in (1, 2)
        for lengths in shapes(512)
    ),
    memory=((100, 1_000_000 + 100 * 5_000), (200, 1_000_000 + 200 * 5_000)),
    limit_bytes=1_000_000 + 900 * 5_000,
    device="2 x cpu",
    date="2026-11-24",
)


def test_a_profile_gives_the_cost_model_that_made_it_and_reads_back_as_it_was_written(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == PROFILE
    fitted = PROFILE.fit(PRESETS["tiny"])
    assert fitted.cost.tokens_per_gpu == 900
    assert fitted.cost.alpha2 == pytest.approx(COST.alpha2, rel=1e-4)
    assert fitted.cost.bandwidth_gb_s == pytest.approx({2: 0.5}, rel=1e-3)
    for degree, _, measured_ms, model_ms in rows(PROFILE, fitted):
        assert degree in (1, 2)
        assert model_ms == pytest.approx(measured_ms, rel=1e-4)
    (tmp_path / "cost.toml").write_text(PROFILE.to_toml(fitted))
    assert load(tmp_path / "cost.toml") == fitted.cost


@pytest.mark.parametrize("text", ["", "{}", '{"version": 2}', '{"version": 1, "samples": [1]}'])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(DataError, match="profile"):
        Profile.load(tmp_path / "profile.json")


@pytest.mark.parametrize("longest", [1, 7, 64, 1000])
def test_shapes_are_different_and_hold_no_more_than_the_longest(longest: int) -> None:
    found = shapes(longest)
    assert len(set(found)) == len(found) >= 1
    assert all(1 <= sum(lengths) <= longest and min(lengths) >= 1 for lengths in found)


@pytest.mark.parametrize(
    ("num_slots", "expected"), [(1, [1]), (4, [1, 2, 4]), (7, [1, 2, 4, 7]), (12, [1, 2, 3, 4, 6, 8, 12])]
)
def test_groups_fill_the_ranks_or_are_powers_of_two(num_slots: int, expected: list[int]) -> None:
    assert list(degrees(num_slots)) == expected


@pytest.mark.processes
def test_real_ranks_are_profiled_and_the_cost_model_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(
        f'run_dir = "{tmp_path}/run"\n[launch]\nranks = 4\ndevice = "cpu"\n'
        '[parallel]\npp = 2\nsequence = "adaptive"\nsequence_cost = "not-there-yet.toml"\n'
        '[data]\npacking = "documents"\n'
    )
    cost = tmp_path / "cost.toml"
    argv = [
        "doctor",
        "--profile",
        str(tmp_path / "run.toml"),
        "--longest",
        "32",
        "-o",
        str(cost),
        "--json",
    ]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["written"] == str(cost)
    assert 0 <= said["mean_error"] <= said["worst_error"]
    found = load(cost)
    assert (found.layers, found.hidden) == (2, 128)
    assert list(found.bandwidth_gb_s) == [2]
    assert found.tokens_per_gpu > 1000
    assert max(found.alpha1, found.alpha2, found.beta1) > 0
    run = load_run(tmp_path / "run.toml", overrides=[f"parallel.sequence_cost={cost}", "data.global_batch=8"])
    assert (
        prepare(run.config, world_size=4, here=True).sequences is not None
    )  # what was found fits this machine
    assert tomllib.loads(cost.read_text())["tokens_per_gpu"] == said["cost"]["tokens_per_gpu"]


def test_what_only_a_profile_uses_is_refused_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--longest", "64", "-o", "cost.toml"]) == 3
    text = capsys.readouterr().err
    assert "--longest" in text
    assert "--out" in text
    assert main(["doctor", "--profile"]) == 3


def test_the_doctor_prints_what_it_found_for_people_and_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "installation" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"area", "name", "value", "health", "hint"} == set(found[0])
