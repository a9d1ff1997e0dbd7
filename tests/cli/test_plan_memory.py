"""``distrain plan memory``: MEMO's numbers, plans as JSON and CSV, what does not fit, mistakes, pictures."""

import json
from pathlib import Path
from typing import Any

import pytest

from distrain.cli import main
from distrain.planners.buffers import Buffer, table, violations

MEMO = ("--model", "7b", "--seq", "1M", "--gpus", "8", "--hbm", "80GiB", "--host", "2TiB", "--pcie", "11GB/s")


def planned(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(["plan", "memory", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_memos_7b_at_a_million_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *MEMO, "--layer", "gpt")
    assert found["version"] == "distrain.memplan/1"
    assert found["memo"]["alpha"] == pytest.approx(0.467, abs=5e-4)
    assert found["memo"]["binding"] == "host"
    assert found["layer"]["skeletal_units"] == pytest.approx(16.0, abs=0.02)
    assert found["traced_memo"]["alpha"] == pytest.approx(0.467, abs=2e-3)
    assert found["device_bytes"].keys() == {
        "states", "gathered weights", "rounding buffers", "kept activations", "arena",
    }  # fmt: skip
    assert sum(found["device_bytes"].values()) <= found["device_limit_bytes"]
    assert found["predicted"]["host_bytes"] <= found["host_limit_bytes"]
    assert found["levels"]["flat"]["gap"] <= 0.01
    assert found["levels"]["loss"] >= found["levels"]["flat"]["gap"]
    assert len(found["alpha"]) == 32
    assert found["predicted"]["mfu_causal"] < found["predicted"]["mfu_full"]


def test_the_text_names_what_binds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "memory", *MEMO]) == 0
    text = capsys.readouterr().out
    for expected in (
        "1,048,576 tokens on 8 GPUs",
        "alpha 0.467; the host row binds",
        "rounding buffers",
        "MFU",
    ):
        assert expected in text


def test_swapped_tokens_are_whole_multiples_of_128(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *MEMO)
    rows = found["layer"]["num_tokens"]
    for kept, swapped in zip(found["policy"]["kept_tokens"], found["policy"]["swapped_tokens"], strict=True):
        for keep, swap in zip(kept, swapped, strict=True):
            assert keep % 128 == 0 or keep == rows
            assert swap % 128 == 0 or keep + swap == rows


def test_the_plan_and_its_addresses_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, arena = tmp_path / "plan.json", tmp_path / "arena.csv"
    found = planned(capsys, "--model", "1.3b", "--seq", "64K", "-o", str(plan), "--csv", str(arena))
    assert json.loads(plan.read_text()) == found
    rows = [line.split(",") for line in arena.read_text().splitlines()[1:]]
    buffers = [Buffer(name, int(lower), int(upper), int(size)) for name, lower, upper, size, _ in rows]
    assert tuple(buffers) == table.read(arena)
    assert not violations(buffers, [int(row[4]) for row in rows], peak=int(found["device_bytes"]["arena"]))


def test_a_pipeline_and_replicas_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(
        capsys, "--model", "13b", "--seq", "128K", "--gpus", "64", "--tp", "8", "--pp", "4", "--dp", "2"
    )
    assert (found["request"]["cp"], found["request"]["micro_batches"]) == (1, 8)
    assert len(found["alpha"]) == 10


def test_what_does_not_fit_ends_with_4_and_an_account(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "memory", *MEMO, "--seq", "4M"]) == 4
    error = capsys.readouterr().err
    for expected in (
        "cannot hold the two rounding buffers",
        "4194304 tokens do not fit",
        "states",
        "K tokens may fit",
    ):
        assert expected in error
    assert main(["plan", "memory", *MEMO, "--host", "100GiB", "--hbm", "76GiB"]) == 4
    assert "fits neither on the host nor on the device" in capsys.readouterr().err


def test_all_mistakes_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "plan",
        "memory",
        "--model",
        "7bb",
        "--seq",
        "long",
        "--hbm",
        "0GiB",
        "--gpus",
        "6",
        "--tp",
        "4",
    ]
    assert main(command) == 3
    error = capsys.readouterr().err
    for expected in ("--model 7b", "--seq cannot be read", "--hbm cannot be read", "4 x 1 x 1 x 1 = 4"):
        assert expected in error
    assert main(["plan", "memory", "--model", "7b", "--seq", "1001", "--gpus", "8"]) == 3
    assert "tp x cp does not divide the sequence length" in capsys.readouterr().err


def test_the_picture_has_four_panels(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    assert (
        main(["plan", "memory", "--model", "125m", "--seq", "32K", "--gpus", "4", "--plot", str(picture)])
        == 0
    )
    text = picture.read_text()
    assert text.count('id="axes_') >= 4
