"""``distrain config show``: what it prints is the config, loads back, and says where each value came from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distrain.cli import main
from distrain.core.config import flatten, nested
from distrain.core.load import load

CONFIG = """\
run_dir = 'runs/"quoted" \\ é 🙂'
seed = 7

[parallel]
tp = 2
schedule = "zbv"

[optimizer]
eps = 1e-12

[[checkpoint.tiers]]
url = "near-{node}"
shared = false
every = 2
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in os.environ:
        if name.startswith("DISTRAIN_"):
            monkeypatch.delenv(name)
    path = tmp_path / "run.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


@pytest.mark.parametrize(("flags", "suffix"), [([], ".toml"), (["--origin"], ".toml"), (["--json"], ".json")])
def test_what_is_printed_loads_back_to_the_same_config(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], suffix: str
) -> None:
    overrides = ["train.steps=5", "model.parallel_block=true"]
    sets = [word for override in overrides for word in ("--set", override)]
    assert main(["config", "show", str(path), *sets, *flags]) == 0
    printed = tmp_path / f"printed{suffix}"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load(printed, environ={}).config == load(path, overrides=overrides, environ={}).config


def test_origins_name_file_and_line_variable_override_and_default(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISTRAIN_TRAIN__DTYPE", "float64")
    assert main(["config", "show", str(path), "--origin", "--set", "train.steps=5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    origins = {line.partition(" = ")[0]: line.rpartition("  # ")[2] for line in lines if " = " in line}
    assert origins["seed"] == f"{path}:2"
    assert origins["tp"] == f"{path}:5"
    assert origins["dtype"] == "environment DISTRAIN_TRAIN__DTYPE"
    assert origins["steps"] == "--set train.steps"
    assert origins["pp"] == "default"
    assert len({line.index("  # ") for line in lines if "  # " in line}) == 1


def test_json_with_origins_gives_value_and_origin_of_every_key(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(path), "--json", "--origin"]) == 0
    table = json.loads(capsys.readouterr().out)
    config = load(path, environ={}).config
    assert {key: entry["value"] for key, entry in table.items()} == flatten(config)
    assert table["parallel.tp"]["origin"] == f"{path}:5"


def test_plain_json_is_the_nested_config(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == nested(load(path, environ={}).config)


def test_a_wrong_config_lists_every_problem_and_exits_with_three(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text("[train]\nsteps = 1.5\nstep = 1\n")
    assert main(["config", "show", str(path), "--set", "modle.preset=7b"]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 3
    assert captured.out == ""


@pytest.mark.processes
def test_the_module_runs_as_the_command(path: Path) -> None:
    command = [sys.executable, "-m", "distrain", "config", "show", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "seed = 7" in done.stdout
