"""The command line: cheap to start, verbs imported when called, errors in four lines, exit codes."""

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

import distrain
from distrain.cli import VERBS, main
from distrain.core.errors import ConfigError, InfeasibleError, Problem


def distrain_process(*argv: str | Path, **environ: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "distrain", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environ},
    )


def with_verb(monkeypatch: pytest.MonkeyPatch, name: str, face: object) -> None:
    """Let ``face`` stand for the verb ``name``, as if it lay in its file."""
    monkeypatch.setitem(sys.modules, f"distrain.cli.{name}", SimpleNamespace(**{name: face}))


def test_help_lists_every_verb_in_its_group_with_one_line_and_ends_with_examples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"\n  {name:8}" in text
        assert verb.help in text
        assert f"\n{verb.group}:\n" in text
    assert "distrain train examples/tiny.toml" in text.partition("Examples:")[2]


def test_the_command_alone_shows_its_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "Examples:" in captured.out + captured.err


@pytest.mark.processes
def test_help_and_core_never_import_torch() -> None:
    script = """
import pkgutil, sys
from importlib import import_module
import distrain.core
from distrain.cli import main
assert main(["--help"]) == 0
assert "numpy" not in sys.modules and "rich" not in sys.modules
for module in pkgutil.iter_modules(distrain.core.__path__):
    if module.name != "device":
        import_module(f"distrain.core.{module.name}")
        assert "torch" not in sys.modules, module.name
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_names_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    text = capsys.readouterr().out
    assert f"distrain {distrain.__version__}" in text
    assert f"torch {version('torch')}" in text
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in text
    root = Path(distrain.__file__).parent.parent
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert head.startswith(text.partition("commit ")[2].strip())


def test_a_misspelt_verb_names_the_nearest_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
    assert main(["xyz"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_an_unknown_flag_of_a_verb_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "x.toml", "--orgin"]) == 2
    assert "--orgin" in capsys.readouterr().err


def test_errors_are_shown_in_four_lines_each_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = [Problem("a is wrong", "1", "2", "--set a=2"), Problem("b is wrong")]

    def train() -> None:
        raise ConfigError.of(problems)

    with_verb(monkeypatch, "train", train)
    assert main(["train"]) == 3
    captured = capsys.readouterr()
    assert captured.err == "error: a is wrong\ngot: 1\nallowed: 2\ntry: --set a=2\n\nerror: b is wrong\n"
    assert captured.out == ""


@pytest.mark.parametrize("switch", ["flag", "variable"])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], switch: str
) -> None:
    def train() -> None:
        raise InfeasibleError("no layout fits")

    with_verb(monkeypatch, "train", train)
    if switch == "variable":
        monkeypatch.setenv("DISTRAIN_DEBUG", "1")
    assert main(["--debug", "train"] if switch == "flag" else ["train"]) == 4
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (5, 5)])
def test_what_a_verb_returns_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, returned: int | None, code: int
) -> None:
    with_verb(monkeypatch, "train", lambda: returned)
    assert main(["train"]) == code


def test_launch_receives_its_words_exactly_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[list[str]] = []

    def launch(argv: list[str]) -> int:
        received.append(argv)
        return 7

    with_verb(monkeypatch, "launch", launch)
    for words in (
        [],
        ["--help"],
        ["--nproc-per-node", "2", "--", "script.py", "--", "-h", "--debug", "--version"],
        ["--nproc_per_node=2", "-m", "package.module", "--d", "64", "-x", "--set", "", "a b"],
        ["script.py", "--nproc-per-node=3", "-123"],
    ):
        assert main(["launch", *words]) == 7
        assert received[-1] == words


def test_one_broken_verb_leaves_the_others_standing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text("seed = 5\n")
    monkeypatch.setitem(sys.modules, "distrain.cli.train", None)
    assert main(["--help"]) == 0
    assert main(["config", "show", str(tmp_path / "run.toml")]) == 0
    assert "seed = 5" in capsys.readouterr().out
    with pytest.raises(ImportError):
        main(["train"])


def test_a_run_folder_that_cannot_be_made_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").touch()
    assert main(["train", str(tmp_path / "run.toml"), "--set", "run_dir=/proc/none/run"]) == 3
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: run_dir cannot be written to" and said[1].startswith("got: /proc/none")


@pytest.mark.processes
def test_an_interrupt_ends_in_one_line_and_130(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    os.mkfifo(path)  # whoever reads it waits for the writer
    process = distrain_process("config", "show", path)
    with path.open("w"):  # opens once the reader is there
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=150)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


@pytest.mark.processes
def test_a_reader_that_leaves_early_causes_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    process = distrain_process("config", "show", tmp_path / "run.toml", PYTHONUNBUFFERED="1")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=150) == 1
