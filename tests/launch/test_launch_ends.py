"""How jobs end: well, or by a failing rank, with everything stopped and the right story told."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.processes
Launch = Callable[..., Any]
Script = Callable[[str], str]
AllGone = Callable[[list[int]], None]

SLEEP = "print('pid', os.getpid(), flush=True); time.sleep(100)"
IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def test_a_job_whose_ranks_all_end_well_ends_with_0(launch: Launch, script: Script) -> None:
    job = launch(
        "--nproc-per-node", "3", script("print(sys.argv[1:], rank)"), "--d", "64", "--help", "--nnodes", "9"
    )
    assert job.wait() == 0
    words = ["--d", "64", "--help", "--nnodes", "9"]
    assert sorted(job.lines) == [f"[rank {rank}] {words} {rank}" for rank in range(3)]
    assert job.err.count("OMP_NUM_THREADS is not set") == 1


def test_the_heap_of_ranks_is_kept_unless_the_user_says_how(launch: Launch, script: Script) -> None:
    show = script("print([v for k, v in sorted(os.environ.items()) if k.startswith('MALLOC')])")
    plain = launch("--nproc-per-node", "2", show)
    chosen = launch("--nproc-per-node", "1", show, env={"MALLOC_TRIM_THRESHOLD_": "9"})
    assert plain.wait() == chosen.wait() == 0
    assert {line.rpartition("] ")[2] for line in plain.lines} == {"['33554432', '1073741824']"}
    assert [line.rpartition("] ")[2] for line in chosen.lines] == ["['9']"]


def test_threads_are_left_to_the_user_who_sets_them(launch: Launch, script: Script) -> None:
    job = launch(
        "--nproc-per-node", "2", script("print(os.environ['OMP_NUM_THREADS'])"), env={"OMP_NUM_THREADS": "7"}
    )
    assert job.wait() == 0
    assert sorted(job.lines) == ["[rank 0] 7", "[rank 1] 7"]
    assert job.err == ""


def test_a_module_a_program_and_a_run_path_are_started(
    launch: Launch, script: Script, tmp_path: Path
) -> None:
    path = Path(script("print(__name__, sys.argv[1:], rank)"))
    module = launch("-m", path.stem, "a", env={"PYTHONPATH": str(tmp_path)})
    program = launch("--no-python", "sh", "-c", "echo $0 $RANK", "a")
    run_path = launch("--run-path", str(path), "a")
    assert [job.wait() for job in (module, program, run_path)] == [0, 0, 0]
    assert module.lines == ["__main__ ['a'] 0"]
    assert program.lines == ["a 0"]
    assert run_path.lines == ["__main__ ['a'] 0"]


def test_a_program_gets_its_default_signals_back(launch: Launch) -> None:
    job = launch("--no-python", "sh", "-c", "yes | head -n 1; grep SigIgn /proc/self/status")
    assert job.wait() == 0
    assert job.lines[0] == "y"
    assert int(job.lines[1].split()[1], 16) & (1 << 12) == 0  # SIGPIPE


@pytest.mark.parametrize(
    ("fails", "told", "error"),
    [
        ("raise ValueError('bad luck')", "exit code 1", "ValueError: bad luck"),
        ("sys.exit(3)", "exit code 3", ""),
        ("print('last words', file=sys.stderr); os.kill(os.getpid(), 9)", "SIGKILL", "last words"),
        ("os.abort()", "SIGABRT", "Fatal Python error: Aborted"),
    ],
)
def test_when_a_rank_fails_the_others_are_stopped_and_its_error_is_told(
    fails: str, told: str, error: str, launch: Launch, script: Script, all_gone: AllGone
) -> None:
    path = script(f"if rank == 1: {fails}\n{SLEEP}")
    job = launch("--nproc-per-node", "3", path)
    assert job.wait() == 1
    all_gone(job.pids())
    story = job.err[job.err.index("error: rank 1 failed first") :]
    assert told in story.splitlines()[0]
    assert error in story
    assert story.splitlines()[-1] == "others: 2 ranks (0, 2) stopped by the launcher"


def test_ranks_that_ignore_sigterm_are_killed(launch: Launch, script: Script, all_gone: AllGone) -> None:
    path = script(
        f"{IGNORE}\nif rank: {SLEEP}\nwhile not os.path.exists('go'): time.sleep(0.01)\nsys.exit(4)"
    )
    job = launch("--nproc-per-node", "3", path)
    job.until("pid", times=2)
    (job.folder / "go").touch()
    assert job.wait() == 1
    all_gone(job.pids())
    assert "rank 0 failed first: exit code 4" in job.err


def test_what_a_rank_has_started_is_stopped_with_it(
    launch: Launch, script: Script, all_gone: AllGone
) -> None:
    grandchild = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'], process_group=0)"
    path = script(
        f"import subprocess\nchild = {grandchild}\nprint('pid', child.pid, flush=True)\nsys.exit(rank)"
    )
    job = launch("--nproc-per-node", "2", path)
    assert job.wait() == 1
    assert len(job.pids()) == 2
    all_gone(job.pids())
    assert "SIGKILL did not end" not in job.err


def test_what_a_rank_has_left_behind_is_stopped_when_the_job_is_done(
    launch: Launch, script: Script, all_gone: AllGone
) -> None:
    path = script("import subprocess\nprint('pid', subprocess.Popen(['sleep', '100']).pid)")
    job = launch(path)
    assert job.wait() == 0
    all_gone(job.pids())
    assert "SIGKILL did not end" not in job.err


def test_the_same_error_on_several_ranks_is_told_once(launch: Launch, script: Script) -> None:
    job = launch("--nproc-per-node", "3", script("raise ValueError('same everywhere')"))
    assert job.wait() == 1
    story = job.err[job.err.index("error: rank") :]
    assert story.count("ValueError: same everywhere") == 1
    assert re.search(r"others: same error on 2 ranks \(\d.+\d\)$", story.strip())


def test_the_first_of_two_failures_is_told_first_whatever_their_ranks(launch: Launch, script: Script) -> None:
    wait = "while not os.path.exists('second'): time.sleep(0.01)"
    first = "open('second', 'w').close()\n  signal.signal(15, lambda *_: None)\n  raise ValueError('first')"
    path = script(f"if rank:\n  {first}\n{wait}\ntime.sleep(0.05)\nraise KeyError('second')")
    job = launch("--nproc-per-node", "2", path)
    assert job.wait() == 1
    story = job.err[job.err.index("error: rank") :]
    assert story.startswith("error: rank 1 failed first")
    assert "ValueError: first" in story
    assert "rank 0 failed too" in story


def test_a_recorded_error_is_told_from_its_file(launch: Launch, script: Script) -> None:
    record = json.dumps(
        {"message": {"message": "m", "extraInfo": {"py_callstack": "Traceback of the record"}}}
    )
    path = script(f"open(os.environ['TORCHELASTIC_ERROR_FILE'], 'w').write({record!r})\nsys.exit(1)")
    job = launch("--nproc-per-node", "2", path)
    assert job.wait() == 1
    assert "\nTraceback of the record\n" in job.err


def test_a_program_that_does_not_exist_in_the_worker_is_told(launch: Launch, tmp_path: Path) -> None:
    job = launch("x.py", env={"PYTHON_EXEC": "/nowhere/python"})
    assert job.wait() == 3
    (tmp_path / "x.py").touch()
    job = launch(str(tmp_path / "x.py"), env={"PYTHON_EXEC": "/nowhere/python"})
    assert job.wait() == 1
    assert "cannot start /nowhere/python" in job.err


def test_nothing_starts_when_something_is_impossible(launch: Launch, script: Script) -> None:
    path = script("print('started')")
    job = launch("--nproc-per-node", "0", "--node-rank", "2", path)
    assert job.wait() == 3
    assert job.out == b""
    assert "--nproc-per-node" in job.err
    assert "--node-rank" in job.err
    assert launch("--no-such-flag", path).wait() == 2


def test_files_of_the_job_are_removed_with_it(launch: Launch, script: Script, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    job = launch(
        script("print(os.environ['TORCHELASTIC_ERROR_FILE'])"), env={"TMPDIR": str(tmp_path / "tmp")}
    )
    assert job.wait() == 0
    assert job.lines[0].startswith(str(tmp_path / "tmp"))
    assert list((tmp_path / "tmp").iterdir()) == []


RUN_JOB = """
import sys
from pathlib import Path
from distrain.launch import run_job
code = "import os, sys; print(os.environ['RANK'], os.environ['EXTRA'], sys.stdout.isatty())"
sys.exit(run_job([sys.executable, "-c", code], ranks=2, env={"EXTRA": "x"}, plain_rank=0))
"""


def test_from_python_a_plain_rank_draws_on_the_terminal_and_others_are_prefixed() -> None:
    leader, follower = os.openpty()
    env = {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        [sys.executable, "-c", RUN_JOB], stdin=follower, stdout=follower, stderr=follower, env=env
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 4096)
        except OSError:  # the other side is closed
            break
    os.close(leader)
    assert job.wait() == 0
    assert sorted(shown.decode().split("\r\n")) == ["", "0 x True", "[rank 1] 1 x False"]
