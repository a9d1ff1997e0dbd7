"""The leak checks: each kind of thing left behind fails the test that left it, and is gone for the next one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest prints about the tests of leaky.py."""
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
        cwd=tmp_path_factory.mktemp("leaky"),
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("test", "what"),
    [
        ("test_leaves[child]", r"process: \d+ sleep 1000"),
        ("test_leaves[detached]", r"process: \d+ sleep 1000"),
        ("test_leaves[unmarked]", r"process: \d+ sleep 1000"),
        ("test_leaves[shared]", r"shared memory: distrain-leaky-\w+"),
        ("test_leaves[failpoint]", r"armed failpoint: some\.point"),
        ("test_leaves[group]", r"process group: still initialized"),
        ("test_thread", r"thread: distrain-forgotten"),
    ],
)
def test_what_a_test_leaves_behind_fails_it(output: str, test: str, what: str) -> None:
    title = re.escape(f"ERROR at teardown of {test} ")
    assert re.search(rf"_ {title}_+\n+the test left behind:\n  {what}\n", output), output


def test_everything_left_is_gone_for_the_next_test_and_nothing_else_counts_as_a_leak(output: str) -> None:
    assert re.search(r"= 17 passed, 7 errors in ", output), output
