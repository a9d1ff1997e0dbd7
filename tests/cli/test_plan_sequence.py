"""``distrain plan sequence``: tables, files, pictures, refusals."""

import json
from pathlib import Path

import pytest

from benchmarks.sequence_lengths import draw
from distrain.cli import main
from distrain.planners.sequence import StepPlan, check_plan, load_cost


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    path = tmp_path / "lengths.txt"
    path.write_text("\n".join(map(str, draw("pareto", 1, num=200))) + "\n")
    return path


def plan(path: Path, *arguments: str) -> int:
    return main(["plan", "sequence", "--lengths", str(path), "--gpus", "64", "--cost", "7b", *arguments])


def test_a_table_shows_groups_gap_and_baselines(batch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(batch) == 0
    text = capsys.readouterr().out
    for part in ("micro-batch", "x1", "200 sequences on 64 devices", "gap", "one degree for all", "feasible"):
        assert part in text


def test_json_has_the_keys_that_were_promised(batch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(batch, "--json", "--time-limit", "0.05") == 0
    data = json.loads(capsys.readouterr().out)
    promised = {"microbatches", "estimated_ms", "lower_bound_ms", "gap", "status", "seconds", "baselines"}
    assert data.keys() == promised | {"version", "num_slots", "schedule", "reasons"}
    assert data["baselines"].keys() == {"static", "batch_adaptive"}
    assert data["microbatches"][0][0].keys() == {"ranks", "degree", "sequences", "estimated_ms"}


def test_the_file_holds_the_plan_and_the_picture_is_drawn(batch: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    assert plan(batch, "-o", str(out), "--plot", str(picture)) == 0
    lengths = [int(line) for line in batch.read_text().split()]
    assert check_plan(StepPlan.load(out), lengths, load_cost("7b")) == []
    assert picture.read_text().lstrip().startswith("<?xml")


def test_a_cost_file_and_any_number_of_devices_do(
    batch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = tmp_path / "cost.toml"
    cost.write_text(load_cost("7b").to_toml().replace("6449", "20000"))
    arguments = [
        "plan",
        "sequence",
        "--lengths",
        str(batch),
        "--gpus",
        "24",
        "--cost",
        str(cost),
        "--certify",
        "--json",
    ]
    small = batch.with_name("small.txt")
    small.write_text("\n".join(batch.read_text().split()[:30]))
    arguments[3] = str(small)
    assert main(arguments) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["num_slots"] == 24
    assert "column generation" in data["reasons"][-1]


@pytest.mark.parametrize("schedule", ["asynchronous", "auto"])
def test_a_schedule_can_be_asked_for(batch: Path, capsys: pytest.CaptureFixture[str], schedule: str) -> None:
    assert plan(batch, "--schedule", schedule, "--json") == 0
    assert json.loads(capsys.readouterr().out)["schedule"] in ("asynchronous", "lock-step")


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("", 3, "no sequences to plan"),
        ("12\n0\n", 3, "has no tokens"),
        ("12\nlong\n\n3.5\n", 3, "no lengths"),
        ("12\n--5\n", 3, "no lengths"),
        (f"12\n{'9' * 5000}\n", 3, "no lengths"),
        ("12\n500000\n", 4, "does not fit the memory"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, code: int, message: str
) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(content)
    assert plan(path) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    assert message in captured.err
    assert "got: " in captured.err


def test_all_mistakes_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths, cost = tmp_path / "lengths.txt", tmp_path / "cost.toml"
    lengths.write_text("12\n0\n")
    cost.write_text(load_cost("7b").to_toml().replace("layers = 32", "layers = 0"))
    arguments = ["--lengths", str(lengths), "--gpus", "0", "--cost", str(cost)]
    arguments += ["-o", str(lengths / "plan.json"), "--plot", str(tmp_path / "none" / "plot.text")]
    assert main(["plan", "sequence", *arguments]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 6
    for part in ("layers = 0", "0 slots", "0 (sequence 1)", "plan.json", "by the ending", "none/plot.text"):
        assert part in captured.err
    lengths.write_text("12\nlong\n")
    assert main(["plan", "sequence", *arguments]) == 3
    assert "'long' (line 2)" in capsys.readouterr().err


def test_a_list_of_windows_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_bytes(b"\xef\xbb\xbf12\r\n 30\r\n\r\n")
    assert plan(path, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert sorted(
        each for groups in data["microbatches"] for group in groups for each in group["sequences"]
    ) == [
        0,
        1,
    ]


def test_other_mistakes_end_with_3(batch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(tmp_path / "nowhere.txt") == 3
    assert main(["plan", "sequence", "--lengths", str(batch), "--gpus", "64", "--cost", "70b"]) == 3
    assert main(["plan", "sequence", "--lengths", str(batch), "--gpus", "0", "--cost", "7b"]) == 3
    assert plan(batch, "-o", str(batch / "plan.json")) == 3
    assert plan(batch, "-o", str(tmp_path / ("long" * 80))) == 3
    for name in ("plan.txt", "plan", "."):
        assert plan(batch, "--plot", str(tmp_path / name)) == 3
    assert plan(batch, "--solver", "magic") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "sequence", "--help"]) == 0
    assert "Examples:" in capsys.readouterr().out
