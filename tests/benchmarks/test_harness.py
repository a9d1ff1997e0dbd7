"""The shell of all benchmarks: options, files, verdicts, parts that are kept, and finding the benchmarks."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import harness
from benchmarks.__main__ import names
from benchmarks.harness import Row, Session, Target, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest's own handlers stay


def session(**changes: object) -> Session:
    values: dict[str, object] = {
        "name": "test",
        "quick": False,
        "rounds": 5,
        "resume": None,
        "console": Console(file=io.StringIO(), width=140),
    }
    return Session(**{**values, **changes})  # type: ignore[arg-type]


def test_the_file_holds_machine_date_commit_metrics_and_rows(tmp_path: Path) -> None:
    def run(found: Session) -> None:
        found.row(contender="ours", step_ms=2.0, times_ms=[1.0, 2.0, 3.0])
        found.metric("speed", 1.5, at_least=1.0)
        found.metric("unknown", math.nan, note="nobody knows")

    path = tmp_path / "new" / "result.json"
    main("test", run, ["--json", str(path)])
    content = json.loads(path.read_text())
    assert content["metrics"]["speed"] == 1.5
    assert math.isnan(content["metrics"]["unknown"])
    assert content["rows"] == [{"contender": "ours", "step_ms": 2.0, "times_ms": [1.0, 2.0, 3.0]}]
    assert content["machine"]["cores"] >= 1
    assert content["commit"] == harness.commit()
    assert content["date"].startswith("20")
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_the_table_shows_verdicts_and_leaves_out_lists() -> None:
    found = session()
    found.row(contender="ours", times_ms=[1.25, 2.25])
    found.metric("good", 1.5, at_least=1.0)
    found.metric("bad", 0.5, at_least=1.0)
    found.metric("unsure", math.nan, at_least=1.0, note="not installed")
    found.metric("plain", 3.0)
    found.show()
    assert isinstance(found.console.file, io.StringIO)
    text = found.console.file.getvalue()
    verdicts = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "met" in verdicts["good"].split()
    assert "missed" in verdicts["bad"]
    assert "not resolved" in verdicts["unsure"] and "not installed" in verdicts["unsure"]
    assert verdicts["plain"].split() == ["plain", "3"]
    assert "times_ms" not in text and "2.25" not in text


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (Target(at_least=1.0), 1.0, "met"),
        (Target(at_least=1.0), 0.99, "missed"),
        (Target(at_most=2.0), 2.5, "missed"),
        (Target(at_least=1.0, at_most=2.0), 1.5, "met"),
        (Target(at_least=1.0), math.nan, "not resolved"),
        (Target(), 7.0, ""),
    ],
)
def test_a_number_is_judged_by_its_bounds_and_nan_never_meets_them(
    target: Target, value: float, verdict: str
) -> None:
    assert target.verdict(value) == verdict


def test_a_finished_part_is_kept_for_the_same_code_and_options_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def measure() -> list[Row]:
        measured.append(1)
        return [{"run": len(measured), "value": math.nan}]

    def part(**changes: object) -> int:
        return int(session(resume=tmp_path, **changes).part("part", measure)[0]["run"])

    monkeypatch.setattr(harness, "commit", lambda: "abc")
    assert part() == 1
    assert part() == 1  # kept
    assert part(rounds=6) == 2
    assert part(rounds=6, quick=True) == 3
    monkeypatch.setattr(harness, "commit", lambda: "abc+1234")
    assert part(rounds=6, quick=True) == 4
    assert session().part("part", measure)[0]["run"] == 5  # without a folder nothing is kept


def test_a_part_that_fails_is_not_kept(tmp_path: Path) -> None:
    def measure() -> list[Row]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session(resume=tmp_path).part("part", measure)
    assert not list(tmp_path.iterdir())


def test_the_commit_changes_with_every_change_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(harness, "ROOT", tmp_path)
    file = tmp_path / "code.py"
    git("init")
    file.write_text("one")
    git("add", "code.py")
    git("commit", "-m", "first")
    seen = [harness.commit()]
    for text in ("two", "three"):
        file.write_text(text)
        seen.append(harness.commit())
    assert len(set(seen)) == 3
    assert all(commit.startswith(f"{seen[0]}+") for commit in seen[1:])
    file.write_text("one")
    assert harness.commit() == seen[0]


def test_the_run_fails_if_something_of_ours_did_not_work(tmp_path: Path) -> None:
    def run(found: Session) -> None:
        found.metric("other", 1.0)
        found.failed.append("ours: rank 0 died")

    with pytest.raises(SystemExit, match="error: ours: rank 0 died"):
        main("test", run, ["--json", str(tmp_path / "result.json")])
    assert json.loads((tmp_path / "result.json").read_text())["metrics"] == {"other": 1.0}


def test_options_are_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main("test", lambda _: None, ["--qui"])
    assert error.value.code == 2
    assert "--qui" in capsys.readouterr().err


def test_benchmarks_are_found_by_their_files() -> None:
    found = names()
    assert {"fixed_speed", "training"} <= set(found)
    assert not {"harness", "crew", "intervals", "cgroups", "pacing"} & set(found)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(600)  # a dozen programs
def test_every_benchmark_passes_its_smoke_test(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = {json.loads(path.read_text())["benchmark"] for path in tmp_path.glob("*.json")}
    assert results == set(names())
