"""The cost model's files and presets."""

from pathlib import Path

import numpy as np
import pytest

from distrain.core.errors import ConfigError
from distrain.planners.sequence import SequenceCost, load_cost
from distrain.planners.sequence.cost import PRESETS


def test_the_presets_move_what_the_paper_moves() -> None:
    # q, k, v and output, forward and backward, two bytes: 2 MB a token for 7B.
    assert load_cost("7b").megabytes_per_token == 2.0
    assert load_cost("13b").megabytes_per_token == 3.125
    assert load_cost("7b").sequence_ms(1000, 8) == pytest.approx((5.128 + 183.9576 + 2000 / 96.5) / 8)


def test_degrees_are_one_and_those_of_the_table_that_fit() -> None:
    cost = load_cost("7b")
    assert cost.degrees(24) == (1, 2, 4, 8, 16)
    assert cost.degrees(1) == (1,)
    assert cost.degrees(1000) == (1, 2, 4, 8, 16, 32, 64)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_cost_model_survives_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.toml"
    path.write_text(PRESETS[name].to_toml())
    assert load_cost(path) == PRESETS[name]


def test_max_degree_is_kept_and_kept_to(tmp_path: Path) -> None:
    path = tmp_path / "cost.toml"
    path.write_text("max_degree = 4\n" + PRESETS["7b"].to_toml())
    assert load_cost(path).degrees(64) == (1, 2, 4)
    path.write_text(load_cost(path).to_toml())
    assert load_cost(path).max_degree == 4


def test_arrays_and_numbers_cost_the_same() -> None:
    cost = load_cost("7b")
    lengths = np.array([1.0, 77.0, 190_000.0])
    assert cost.sequence_ms(lengths, 16).tolist() == [
        cost.sequence_ms(length, 16) for length in lengths.tolist()
    ]


def test_all_that_is_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "cost.toml"
    path.write_text(
        "alpha1 = -1\nalpha3 = 0\nbeta1 = 'x'\nlayers = 0\nhidden = 8\n[bandwidth_gb_s]\nx = 1\n2 = 0\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_cost(path)
    text = str(caught.value)
    for part in (
        "alpha1 is no time",
        "unknown key",
        "lacks alpha2",
        "lacks tokens_per_gpu",
        "beta1 is no time",
        "layers is no count",
        "no degree",
        "not positive",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("alpha1 = 1e301", "alpha1 is no time"),
        (f"alpha1 = 1{'0' * 400}", "alpha1 is no time"),
        (f"hidden = 1{'0' * 400}", "hidden is no count"),
        (f"tokens_per_gpu = {2**53 + 1}", "tokens_per_gpu is no count"),
        ("02 = 1.0", "no degree"),
        (f"1{'0' * 30} = 1.0", "no degree"),
        (f"2 = 1{'0' * 400}", "not positive"),
        (f"alpha1 = 1{'0' * 5000}", "cannot be read"),
    ],
)
def test_numbers_beyond_reckoning_are_refused(wrong: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.toml"
    key = wrong.split()[0]
    good = load_cost("7b").to_toml()
    lines = [line for line in good.splitlines() if line.split(" ")[0] != key]
    at = len(lines) if key.isdecimal() else 0
    path.write_text("\n".join([*lines[:at], wrong, *lines[at:]]))
    with pytest.raises(ConfigError, match=message) as caught:
        load_cost(path)
    assert len(str(caught.value).replace(str(path), "")) < 300


def test_a_file_of_windows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cost.toml"
    path.write_bytes(b"\xef\xbb\xbf" + load_cost("7b").to_toml().replace("\n", "\r\n").encode())
    assert load_cost(path) == load_cost("7b")


def test_a_name_that_is_nothing_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load_cost("7B")
    assert "--cost 7b" in str(caught.value)


def test_one_device_needs_no_bandwidth() -> None:
    cost = SequenceCost(alpha1=0.0, alpha2=1.0, beta1=0.0, layers=1, hidden=1, tokens_per_gpu=10)
    assert cost.degrees(8) == (1,)
