"""The counts by marker: a full run with too few tests of a kind is red, and skips are shown with their reasons."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from helpers.counts import MINIMUM

TESTS = Path(__file__).resolve().parent

INNER_CONFTEST = """
    from helpers.counts import MarkerCounts
    def pytest_configure(config):
        config.addinivalue_line("markers", "ranks: ")
        config.addinivalue_line("markers", "gpu: ")
        config.pluginmanager.register(MarkerCounts(config, {"ranks": 2, "gpu": 1}))
    """
INNER_TESTS = """
    import pytest
    @pytest.mark.ranks
    def test_one(): pass
    @pytest.mark.ranks
    @pytest.mark.parametrize("n", [2, 4])
    def test_many(n): pass
    @pytest.mark.gpu
    @pytest.mark.skipif(True, reason="no such device here")
    def test_gpu(): pass
    def test_plain(): pass
    """

pytestmark = pytest.mark.processes


def run_pytest(folder: Path, tests: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of a full run of a suite of one file, unless ``arguments`` select something."""
    suite = folder / "suite"
    suite.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = suite\naddopts = -ra -p no:cacheprovider\n")
    (suite / "conftest.py").write_text(textwrap.dedent(INNER_CONFTEST))
    (suite / "test_inner.py").write_text(textwrap.dedent(tests))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["serial", "parallel"])
def test_tests_are_counted_by_marker_and_skips_by_reason(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, output = run_pytest(tmp_path, INNER_TESTS, *arguments)
    assert code == 0, output
    assert "ranks: 3 (3 passed)" in output
    assert "gpu: 1 (1 skipped)" in output
    assert "SKIPPED [1]" in output and "no such device here" in output
    assert "4 passed, 1 skipped" in output.splitlines()[-1]


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["serial", "parallel"])
def test_a_full_run_with_too_few_tests_of_a_kind_is_red(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, output = run_pytest(tmp_path, INNER_TESTS.replace("mark.ranks", "mark.gpu"), *arguments)
    assert code == pytest.ExitCode.TESTS_FAILED, output
    assert "too few ranks tests: 0 instead of at least 2" in output


@pytest.mark.parametrize("arguments", [("suite/test_inner.py",), ("-k", "plain"), ("-m", "not gpu"), ("-x",)])
def test_a_run_of_chosen_tests_has_no_minimum(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, output = run_pytest(tmp_path, "def test_plain(): pass", *arguments)
    assert code == 0, output
    assert "ranks: 0" in output
    assert "too few" not in output


def test_a_failure_counts_once_although_a_test_reports_thrice(tmp_path: Path) -> None:
    tests = """
        import pytest
        @pytest.fixture
        def broken():
            yield
            raise RuntimeError
        @pytest.mark.ranks
        def test_red(broken): assert False
        """
    code, output = run_pytest(tmp_path, tests)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "ranks: 1 (1 failed)" in output, output


def test_the_minimum_is_for_markers_that_this_project_knows(pytestconfig: pytest.Config) -> None:
    known = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert set(MINIMUM) <= known
    assert all(least > 0 for least in MINIMUM.values())
