"""``distrain plan buffers``: tables in and out, exit codes, JSON, plots, mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distrain.cli import main
from distrain.planners.buffers import table, violations
from helpers.buffers import PINWHEEL, SIDE, TOO_TALL, perfect


@pytest.fixture
def given(tmp_path: Path) -> Path:
    table.write(tmp_path / "in.csv", TOO_TALL)
    return tmp_path / "in.csv"


def test_offsets_are_added_and_nothing_else_changes(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert main(["plan", "buffers", str(given), "-o", str(out)]) == 0
    lines, planned = given.read_text().splitlines(), out.read_text().splitlines()
    assert planned[0] == "id,lower,upper,size,offset"
    assert [line.rpartition(",")[0] for line in planned] == lines
    offsets = [int(line.rpartition(",")[2]) for line in planned[1:]]
    assert not violations(TOO_TALL, offsets, peak=7)


def test_json_says_how_good_the_plan_is(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "buffers", str(given), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["buffers"] == 7
    assert (found["peak"], found["lower_bound"], found["gap"], found["status"]) == (7, 7, 0.0, "optimal")
    assert {"proof", "solver", "seconds"} <= found.keys()


def test_a_capacity_that_nothing_fits_under_ends_with_4(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    command = ["plan", "buffers", str(given), "--capacity", "6", "-o", str(out), "--json"]
    assert main(command) == 4
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["status"], found["peak"], found["lower_bound"]) == ("infeasible", None, 7)
    assert "the buffers do not fit" in captured.err
    assert not out.exists()
    assert main(["plan", "buffers", str(given), "--capacity", "7"]) == 0


@pytest.fixture
def hard(tmp_path: Path) -> Path:
    """Fits under ``SIDE`` with a few gaps in unknown places, and has too many pieces for the search."""
    table.write(tmp_path / "hard.csv", perfect(1200, 0, dropped=0.1))
    return tmp_path / "hard.csv"


def test_without_an_answer_in_time_it_ends_with_5(hard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "buffers", str(hard), "--capacity", str(SIDE), "--time-limit", "0.2"]
    assert main(command) == 5
    error = capsys.readouterr().err
    assert "it is not known whether the buffers fit" in error
    assert "try: a longer --time-limit" in error


@pytest.mark.processes
def test_ctrl_c_ends_a_search_at_once(hard: Path) -> None:
    command = [sys.executable, "-m", "distrain", "plan", "buffers", str(hard), "--capacity"]
    command += [str(SIDE), "--time-limit", "600"]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # so that a second thread is the search's
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while len(os.listdir(f"/proc/{process.pid}/task")) < 2 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_malformed_table_is_refused_with_all_that_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("id,lower,upper,size\na,1,1,4\nb,0,x,4\n")
    assert main(["plan", "buffers", str(path)]) == 3
    error = capsys.readouterr().err
    assert "line 2 of bad.csv never lives" in error
    assert "line 3 of bad.csv: upper is no integer" in error


def test_what_cannot_be_written_is_told_before_the_search(
    hard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "buffers", str(hard), "--capacity", str(SIDE), "--time-limit", "600"]
    assert main([*command, "-o", str(tmp_path), "--plot", str(tmp_path / "none" / "plan.svg")]) == 3
    error = capsys.readouterr().err
    assert "this cannot be written" in error
    assert "a plot cannot be written" in error


@pytest.mark.processes
def test_without_a_compiler_the_answer_is_as_valid_and_says_what_it_lacks(hard: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "DISTRAIN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "distrain", "plan", "buffers", str(hard), "--capacity", str(SIDE)]
    done = subprocess.run(
        [*command, "--time-limit", "0.5"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5, done.stderr
    assert "no native search: native code needs a C++ compiler" in done.stderr


def test_a_folder_that_is_not_there_is_no_place_for_a_plan(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "buffers", str(given), "-o", str(tmp_path / "none" / "out.csv")]) == 3
    assert "this cannot be written" in capsys.readouterr().err


def test_aligned_offsets_are_multiples(tmp_path: Path) -> None:
    table.write(tmp_path / "in.csv", PINWHEEL)
    out = tmp_path / "out.csv"
    assert main(["plan", "buffers", str(tmp_path / "in.csv"), "--align", "4", "-o", str(out)]) == 0
    assert all(int(line.rpartition(",")[2]) % 4 == 0 for line in out.read_text().splitlines()[1:])


def test_the_picture_shows_every_buffer(given: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    assert main(["plan", "buffers", str(given), "--plot", str(picture)]) == 0
    text = picture.read_text()
    assert "lower bound" in text or "<path" in text
    assert text.count("<path") >= len(TOO_TALL)
