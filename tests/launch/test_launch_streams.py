"""What ranks write arrives: on the console with their names, in files as it is."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes
Launch = Callable[..., Any]
Script = Callable[[str], str]

BOTH = "print('out', rank); print('err', rank, file=sys.stderr)"
JUNK = bytes(range(256)).replace(b"\n", b"").replace(b"\r", b"")


def logs(folder: Path) -> dict[str, str]:
    """Contents of the log files below ``folder``, by local rank and name."""
    return {"/".join(path.parts[-2:]): path.read_text() for path in folder.rglob("*.log")}


def test_binary_junk_and_a_last_line_without_newline_arrive_whole(launch: Launch, script: Script) -> None:
    text = (
        f"os.write(1, {JUNK!r} + b'\\n')\nos.write(2, b'no end, rank %d' % rank)\nos.write(1, b'\\nno end')"
    )
    job = launch("--nproc-per-node", "2", script(text))
    assert job.wait() == 0
    for rank in (b"[rank 0] ", b"[rank 1] "):
        lines = [line for line in job.out.split(b"\n") if line.startswith(rank)]
        assert lines == [rank + JUNK, rank, rank + b"no end"]
        assert f"{rank.decode()}no end, rank {rank[6:7].decode()}\n" in job.err
    assert job.out.endswith(b"\n")


def test_long_lines_from_many_ranks_do_not_mix(launch: Launch, script: Script) -> None:
    job = launch("--nproc-per-node", "4", script("for _ in range(50): print(str(rank) * 20_000)"))
    assert job.wait() == 0
    assert sorted(job.lines) == sorted(
        f"[rank {rank}] {str(rank) * 20_000}" for rank in range(4) for _ in range(50)
    )


def test_a_single_rank_and_a_plain_rank_are_passed_through(launch: Launch, script: Script) -> None:
    path = script("os.write(1, b'a\\rb' + str(rank).encode()); os.write(2, b'c\\rd')")
    assert launch(path).wait() == 0
    single = launch(path)
    plain = launch("--nproc-per-node", "2", "--plain-rank", "1", path, env={"OMP_NUM_THREADS": "1"})
    assert [single.wait(), plain.wait()] == [0, 0]
    assert single.out == b"a\rb0"
    assert single.err == "c\rd".replace("\r", "\n")  # read as text
    assert b"a\rb1" in plain.out
    assert sorted(plain.out.replace(b"a\rb1", b"").splitlines()) == [b"[rank 0] a", b"[rank 0] b0"]


def test_without_prefix_lines_stay_as_they_are(launch: Launch, script: Script) -> None:
    job = launch("--nproc-per-node", "2", "--no-prefix", script("print('out', rank)"))
    assert job.wait() == 0
    assert sorted(job.lines) == ["out 0", "out 1"]


def test_a_log_folder_keeps_every_stream_besides_the_console(
    launch: Launch, script: Script, tmp_path: Path
) -> None:
    job = launch("--nproc-per-node", "2", "--log-dir", str(tmp_path / "logs"), script(BOTH))
    assert job.wait() == 0
    assert logs(tmp_path / "logs") == {
        **{f"{rank}/stdout.log": f"out {rank}\n" for rank in (0, 1)},
        **{f"{rank}/stderr.log": f"err {rank}\n" for rank in (0, 1)},
    }
    assert sorted(job.lines) == ["[rank 0] out 0", "[rank 1] out 1"]
    assert str(tmp_path / "logs") in job.err


def test_redirected_streams_go_to_files_only_and_teed_ones_to_both(
    launch: Launch, script: Script, tmp_path: Path
) -> None:
    argv = ["--nproc-per-node", "2", "--log-dir", str(tmp_path / "logs"), "-r", "0:1", "-t", "1:2"]
    job = launch(*argv, script(BOTH))
    assert job.wait() == 0
    assert logs(tmp_path / "logs") == {"0/stdout.log": "out 0\n", "1/stderr.log": "err 1\n"}
    assert job.lines == ["[rank 1] out 1"]
    assert "[rank 0] err 0\n" in job.err
    assert "[rank 1] err 1\n" in job.err


def test_a_filter_shows_some_ranks_only(launch: Launch, script: Script) -> None:
    job = launch("--nproc-per-node", "3", "--local-ranks-filter", "0,2", script(BOTH))
    assert job.wait() == 0
    assert sorted(job.lines) == ["[rank 0] out 0", "[rank 2] out 2"]
    assert "err 1" not in job.err


def test_the_story_of_a_failure_names_the_log(launch: Launch, script: Script, tmp_path: Path) -> None:
    job = launch(
        "--nproc-per-node", "2", "--log-dir", str(tmp_path), "-r", "3", script("print('x'); sys.exit(rank)")
    )
    assert job.wait() == 1
    folder = Path(job.err.partition("log ")[2].splitlines()[0])
    assert (folder / "stdout.log").read_text() == "x\n"


def test_a_console_whose_reader_is_gone_does_not_end_the_job(
    launch: Launch, script: Script, tmp_path: Path
) -> None:
    path = script("for _ in range(2000): print('x' * 100)\nopen(f'done{rank}', 'w').close()")
    command = f"{sys.executable} -m distrain launch --nproc-per-node 2 {path} | head -n 1"
    job = launch("--no-python", "bash", "-c", f"set -o pipefail; {command}")
    assert job.wait() == 0
    assert len(job.lines) == 1
    assert {path.name for path in job.folder.glob("done*")} == {"done0", "done1"}


def test_ranks_read_the_launchers_standard_input(script: Script, launch: Launch) -> None:
    path = script("print(sys.stdin.read())")
    job = launch("--no-python", "sh", "-c", f"echo words | {sys.executable} -m distrain launch {path}")
    assert job.wait() == 0
    assert job.lines[0] == "words"


def test_prefixes_are_coloured_on_a_terminal_only(launch: Launch, script: Script) -> None:
    leader, follower = os.openpty()
    argv = [sys.executable, "-m", "distrain", "launch", "--nproc-per-node", "2", script("print(rank)")]
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    pid = os.posix_spawn(
        sys.executable, argv, env, file_actions=[(os.POSIX_SPAWN_DUP2, follower, fd) for fd in (1, 2)]
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 4096)
        except OSError:  # the other side is closed
            break
    os.close(leader)
    assert os.waitpid(pid, 0)[1] == 0
    assert b"\x1b[36m[rank 0]\x1b[0m 0" in shown
    assert b"\x1b[33m[rank 1]\x1b[0m 1" in shown
