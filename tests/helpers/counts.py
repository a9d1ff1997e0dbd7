"""Pytest plugin: counts the tests that ran under each marker, and fails a full run that ran too few.

A suite that depends on the machine can be green and empty: a wrong condition, and everything about ranks or GPUs is
skipped or never collected. Therefore a run says how many tests of each kind it had (pytest's -ra says what was
skipped and why), and a full run fails below ``MINIMUM``.
"""

from collections import Counter
from collections.abc import Mapping

import pytest

MINIMUM: Mapping[str, int] = {"ranks": 50, "processes": 100, "gpu": 8}
"""Tests that a full run must collect at least, those skipped included. Raise it when you add tests."""


class MarkerCounts:
    """Counts by the reports, which reach the controlling process also when workers run the tests."""

    def __init__(self, config: pytest.Config, minimum: Mapping[str, int]) -> None:
        self._minimum = minimum
        self._is_full = is_full_run(config)
        self._outcomes: dict[str, dict[str, str]] = {marker: {} for marker in minimum}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember each test's worst outcome: setup, call and teardown report separately."""
        for marker in self._outcomes.keys() & report.keywords.keys():
            if self._outcomes[marker].get(report.nodeid, "passed") == "passed":
                self._outcomes[marker][report.nodeid] = report.outcome

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Turn a green run with too few tests red."""
        if self._is_full and self._too_few() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print counts by marker."""
        terminalreporter.section("tests by marker")
        for marker, outcomes in self._outcomes.items():
            counts = Counter(outcomes.values())
            detail = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
            terminalreporter.line(f"{marker}: {len(outcomes)}" + (f" ({detail})" if detail else ""))
        for line in self._too_few() if self._is_full else []:
            terminalreporter.line(line, red=True)

    def _too_few(self) -> list[str]:
        return [
            f"too few {marker} tests: {len(self._outcomes[marker])} instead of at least {least}"
            for marker, least in self._minimum.items()
            if len(self._outcomes[marker]) < least
        ]


def is_full_run(config: pytest.Config) -> bool:
    """Whether everything was asked for: no paths, no selection but that of `make test`, no stop at first failures."""
    options = ("keyword", "deselect", "lf", "maxfail", "collectonly")
    chosen = any(config.getoption(name, default=None) for name in options)
    chosen |= config.getoption("markexpr", default="") not in ("", "not alone")
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen
