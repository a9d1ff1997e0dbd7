"""The command line: torchrun's flags, nothing after the script, every problem at once."""

import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from distrain.core.errors import ConfigError
from distrain.launch import flags
from distrain.launch.options import LaunchOptions
from distrain.launch.reading import parse


@pytest.fixture
def here(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.touch()
    return str(path)


def problems(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv, environ={})
    return str(caught.value)


def test_every_flag_of_the_installed_torchrun_is_known_under_every_spelling() -> None:
    theirs = {
        word: action.nargs == 0 for action in get_args_parser()._actions for word in action.option_strings
    }
    ours = {spelling: not flag.metavar for flag in flags.FLAGS for spelling in flag.spellings}
    ours |= {"-h": True, "--help": True}
    assert theirs.items() <= ours.items()


def test_flags_are_read_under_both_spellings_and_with_equals(here: str) -> None:
    for argv in (["--nproc-per-node", "3"], ["--nproc_per_node=3"], ["--nproc-per-node=3"]):
        assert parse([*argv, here], environ={}).nproc == 3
    assert parse(["-r3", "--nproc-per-node", "2", here], environ={}).redirects == (3, 3)
    assert parse(["-t", "0:1,1:2", "--nproc-per-node", "2", here], environ={}).tee == (1, 2)


def test_nothing_after_the_script_is_interpreted(here: str) -> None:
    words = ["--d", "64", "--help", "--nnodes", "5", "-m", "--", "--nproc-per-node=9", "-x"]
    options = parse(["--nproc-per-node", "2", here, *words], environ={})
    assert options.command[-len(words) :] == tuple(words)
    assert (options.nproc, options.nnodes) == (2, 1)
    assert parse(["--", here, "--", "a"], environ={}).command[-3:] == (here, "--", "a")


def test_flags_are_never_abbreviated(here: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--nproc", "2", here], environ={})
    assert caught.value.code == 2
    assert "--nproc" in capsys.readouterr().err


def test_without_a_script_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--nnodes", "2"], environ={})
    assert caught.value.code == 2
    assert "SCRIPT" in capsys.readouterr().err


def test_help_shows_groups_and_its_examples_can_be_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], environ={})
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n{title}:" in shown for title in flags.GROUPS)
    examples = [line.strip() for line in shown.splitlines() if line.startswith("  distrain launch")]
    assert len(examples) == 6
    for line in examples:
        values, script = flags.parse(shlex.split(line)[2:], environ={})
        assert script
        assert values


def test_the_environment_sets_what_the_command_line_does_not(here: str) -> None:
    environ = {"PET_NPROC_PER_NODE": "4", "PET_NNODES": "2", "PET_MASTER_PORT": "1234", "PET_NO_PYTHON": "0"}
    options = parse(["--nnodes", "3", here], environ=environ)
    assert (options.nproc, options.nnodes, options.master_port) == (4, 3, 1234)
    assert parse(["train.module"], environ={"PET_MODULE": "1"}).command[1:] == ("-m", "train.module")


def test_scripts_modules_programs_and_configs_become_the_right_command(here: str, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.touch()
    environ = {"PYTHON_EXEC": "python9"}
    assert parse([here, "a"], environ=environ).command == ("python9", here, "a")
    assert parse(["-m", "pkg.mod", "a"], environ=environ).command == ("python9", "-m", "pkg.mod", "a")
    assert parse(["--no-python", "sh", "-c", ":"], environ=environ).command == ("sh", "-c", ":")
    assert parse([str(config), "a"], environ=environ).command == (
        "python9",
        "-m",
        "distrain.train",
        str(config),
        "a",
    )
    holds = [parse(words).holds_keeper for words in ([here], ["-m", "pkg.toml"], [str(config)])]
    assert holds == [True, True, False]  # the next launch of a run finds what was in memory


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    text = problems(
        *("--nproc-per-node", "0", "--nnodes", "2:3", "--node-rank", "7", "--max-restarts", "2"),
        *("--rdzv-backend", "etcd", "--master-port", "99999", "-r", "9", "--local-ranks-filter", "a"),
        *("--numa-binding", "node", "--rdzv-conf", "join_timout=3", "--shutdown-timeout", "-1"),
        *("--log-dir", __file__, str(tmp_path / "missing.py")),
    )
    for word in (
        *("--nproc-per-node", "2:3", "--node-rank", "--max-restarts", "etcd", "99999", "--redirects"),
        *(
            "--local-ranks-filter",
            "--numa-binding",
            "join_timeout",
            "--shutdown-timeout",
            "--log-dir",
            "missing.py",
        ),
    ):
        assert word in text, word


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nproc-per-node", "two"], "whole number"),
        (["--nnodes", "0"], "--nnodes must be positive"),
        (["--emulate-nodes", "0"], "--emulate-nodes must be positive"),
        (["--emulate-nodes", "257"], "asks too much of one machine"),
        (["--emulate-nodes", "2", "--nnodes", "2"], "emulated nodes are all there is"),
        (["--plain-rank", "1"], "--plain-rank is out of range"),
        (["--nnodes", "2", "--rdzv-backend", "c10d"], "--rdzv-endpoint is needed"),
        (
            ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host:0"],
            "a port that every node knows",
        ),
        (["--nnodes", "2", "--standalone"], "must be 1 with --standalone"),
        (["--plan", "/nowhere/plan.json"], "plan cannot be read"),
    ],
)
def test_an_impossible_value_is_explained(argv: list[str], message: str, here: str) -> None:
    assert message in problems(*argv, here)


def test_module_and_program_exclude_each_other() -> None:
    assert "--module cannot be combined" in problems("-m", "--no-python", "sh")


def test_nodes_meet_where_they_are_told(here: str) -> None:
    static = parse(["--nnodes", "2", "--node-rank", "1", "--master-addr", "host0", here], environ={})
    assert (static.node_rank, static.master_addr, static.master_port) == (1, "host0", 29500)
    argv = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "[::1]:77", "--rdzv-id", "j"]
    c10d = parse([*argv, "--rdzv-conf", "is_host=true,join_timeout=9", here], environ={})
    assert (c10d.node_rank, c10d.master_addr, c10d.master_port) == (None, "::1", 77)
    assert (c10d.run_id, c10d.is_host, c10d.join_timeout_s, c10d.shared_port) == ("j", True, 9.0, False)


def test_options_survive_the_way_to_another_process(here: str) -> None:
    options = parse(["--nproc-per-node", "2", "-t", "3", "--shutdown-timeout", "7", here, "x"], environ={})
    assert LaunchOptions.from_json(options.to_json()) == options
