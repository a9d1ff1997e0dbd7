"""The leak checks: each kind of thing left behind fails the test that left it, and is gone for the next one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.processes


LEAKS = {
    "test_leaves[child]": r"process: \d+ sleep 1000",
    "test_leaves[detached]": r"process: \d+ sleep 1000",
    "test_leaves[unmarked]": r"process: \d+ sleep 1000",
    "test_leaves[shared]": r"shared memory: distrain-leaky-\w+",
    "test_leaves[failpoint]": r"armed failpoint: some\.point",
    "test_leaves[group]": r"process group: still initialized",
    "test_thread": r"thread: distrain-forgotten",
}


def test_what_a_test_leaves_behind_fails_it_and_is_gone_for_the_next(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--noconftest",
        "-p",
        "helpers.leaks",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "--rootdir", str(HERE), "-c", os.devnull, str(HERE / "leaky.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    for test, what in LEAKS.items():
        title = re.escape(f"ERROR at teardown of {test} ")
        assert re.search(rf"_ {title}_+\n+the test left behind:\n  {what}\n", done.stdout), done.stdout
    assert re.search(rf"= 17 passed, {len(LEAKS)} errors in ", done.stdout), done.stdout + done.stderr
