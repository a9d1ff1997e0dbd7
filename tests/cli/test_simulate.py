"""``distrain simulate``: tables, JSON, plots, traces, mistakes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distrain.cli import main

SMALL = ("--gpus", "512", "--days", "20", "--spares", "4", "--seeds", "3", "--set", "failures.scale=10")


def found(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(["simulate", *SMALL, "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_table_shows_where_the_time_went(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *SMALL]) == 0
    text = capsys.readouterr().out
    for expected in (
        "512 GPUs, 20 days, 3 runs",
        "effective training time ratio 0.",
        "lost work",
        "faulty_gpu",
    ):
        assert expected in text


def test_json_is_the_same_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (found(capsys, "--seed", seed) for seed in ("3", "3", "4"))
    assert first == again != other
    assert first["scenario"]["job"]["gpus"] == 512
    assert sum(share["mean"] for share in first["shares"].values()) == pytest.approx(1)
    assert first["ettr"]["low"] < first["ettr"]["mean"] < first["ettr"]["high"]
    assert first["ettr"] == first["shares"]["training"]


def test_the_search_gives_the_curve_and_its_top(capsys: pytest.CaptureFixture[str]) -> None:
    result = found(capsys, "--search", "--interval", "20000")
    best = max(result["curve"], key=lambda point: point["ettr"]["mean"])
    assert result["best_interval_s"] == best["interval_s"] < 20_000
    assert best["ettr"]["mean"] > result["ettr"]["mean"]
    assert main(["simulate", *SMALL, "--search"]) == 0
    assert "best interval" in capsys.readouterr().out


def test_failures_that_were_written_give_the_same_run_when_they_are_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    drawn = found(capsys, "--seeds", "1", "--interval", "600", "--save-trace", str(trace))
    assert drawn["written"] == [str(trace)]
    read = found(capsys, "--trace", str(trace), "--interval", "600")
    assert (read["seeds"], read["ettr"]["low"]) == (1, None)
    for name in ("ettr", "shares", "classes", "interruptions"):
        assert read[name] == drawn[name]


def test_flags_win_over_the_file_and_set_over_flags(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text("[job]\ngpus = 64\ndays = 5\n[failures]\nmix = 'c4'\n")
    arguments = ["simulate", str(path), "--days", "6", "--gpus", "80", "--set", "job.gpus=96", "--json"]
    assert main(arguments) == 0
    scenario = json.loads(capsys.readouterr().out)["scenario"]
    assert (scenario["job"]["gpus"], scenario["job"]["days"]) == (96, 6.0)
    assert scenario["failures"]["mix"] == "c4"


def test_all_mistakes_are_listed_and_end_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "simulate",
        "--mix",
        "llama",
        "--gpus",
        "7",
        "--set",
        "recovery.restart=4",
        "--interval",
        "never",
    ]
    assert main(arguments) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 4
    assert "try: recovery.restart_s" in captured.err
    assert main(["simulate", "--set", "job.days"]) == 3
    assert "an override has no value" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--save-trace", "--plot"])
def test_what_cannot_be_written_is_a_mistake(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str
) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    assert main(["simulate", *SMALL, option, str(tmp_path / "file" / "within")]) == 3
    assert f"cannot be written\ngot: {tmp_path}" in capsys.readouterr().err


def test_plots_are_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = found(capsys, "--search", "--plot", str(tmp_path / "plots"))
    names = ["lost_time.svg", "timeline.svg", "interval.svg"]
    assert result["written"] == [str(tmp_path / "plots" / name) for name in names]
    for name in names:
        assert "<svg" in (tmp_path / "plots" / name).read_text()


def test_plots_without_matplotlib_are_refused_before_anything_is_simulated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", *SMALL, "--plot", str(tmp_path / "plots")]) == 1
    captured = capsys.readouterr()
    assert "pip install 'distrain[plot]'" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "plots").exists()


def test_this_machine_can_be_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = found(capsys, "--measure", str(tmp_path), "--state-gb", "0.5")
    memory, disk = result["scenario"]["checkpoint"]["levels"]
    assert 0 < memory["restore_s"] == result["scenario"]["checkpoint"]["stall_s"]
    assert disk["delay_s"] > 0 < disk["restore_s"]
    assert result["scenario"]["recovery"]["restart_s"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_an_interrupt_of_a_long_simulation_ends_in_one_line_and_130(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    os.mkfifo(path)
    process = subprocess.Popen(
        [sys.executable, "-m", "distrain", "simulate", str(path), "--seeds", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    path.write_text("[job]\ngpus = 16384\n")  # once this returns, everything is imported and the work begins
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=150)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
