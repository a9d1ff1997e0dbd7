"""Which failure is told first, and how the end of a job is put into words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distrain.launch.failure import (
    NodeReport,
    WorkerExit,
    error_in,
    exception_line,
    exit_code,
    first_failure,
    ranges,
    recorded_error,
    summary,
)

TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n    f()\n'
LOST = TRACE + "RuntimeError: [pair.cc:534] Connection closed by peer [127.0.0.1]:4711"


def ended(rank: int, *, code: int = 1, at: float = 1.0, error: str = "", stopped: bool = False) -> WorkerExit:
    return WorkerExit(
        rank=rank, local_rank=rank, node="n", pid=100 + rank, code=code, at=at, error=error, stopped=stopped
    )


def test_the_earliest_failure_is_first() -> None:
    first = first_failure([ended(0, at=3.0), ended(1, at=2.0), ended(2, code=0, at=1.0)])
    assert first is not None
    assert first.rank == 1


def test_an_error_about_a_lost_peer_comes_after_its_cause_even_if_it_was_seen_earlier() -> None:
    first = first_failure([ended(0, at=1.0, error=LOST), ended(1, at=1.5, code=3)])
    assert first is not None
    assert first.rank == 1


def test_of_two_that_were_seen_together_the_killed_one_is_first() -> None:
    first = first_failure([ended(0, error=TRACE + "E: e"), ended(1, code=-9)])
    assert first is not None
    assert first.rank == 1


def test_what_the_launcher_stopped_did_not_fail() -> None:
    assert first_failure([ended(0, code=-15, stopped=True), ended(1, code=0)]) is None


def test_the_exit_code_is_1_for_failures_and_128_plus_the_signal_for_stops() -> None:
    good = NodeReport(exits=(ended(0, code=0),))
    stopped = NodeReport(exits=(ended(0, code=-2, stopped=True),), signum=2)
    assert exit_code([good]) == 0
    assert exit_code([good, stopped]) == 130
    assert exit_code([stopped, NodeReport(exits=(ended(1, code=3),))]) == 1
    assert exit_code([good, NodeReport(trouble="the store ended")]) == 1


def test_a_report_survives_the_way_to_another_node() -> None:
    report = NodeReport(exits=(ended(3, error=TRACE), ended(4)), trouble="t", signum=15)
    assert NodeReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_the_summary_tells_the_first_failure_and_counts_the_others() -> None:
    exits = [
        ended(0, code=-15, stopped=True),
        ended(1, error=TRACE + "ValueError: bad", at=1.0),
        ended(2, error=TRACE + "ValueError: bad", at=2.0),
        ended(3, error=LOST, at=0.5),
        ended(4, code=7, at=3.0),
        ended(5, code=-15, stopped=True),
        ended(6, code=0),
    ]
    text = summary(exits)
    assert (
        text.index("rank 1 failed first: exit code 1") < text.index("ValueError: bad") < text.index("others:")
    )
    assert "pid 101" in text
    assert text.splitlines()[-1] == (
        "others: same error on 1 rank (2); 1 rank (3) lost contact with a peer; rank 4 failed too: exit code 7; "
        "2 ranks (0, 5) stopped by the launcher; 1 rank (6) had finished"
    )


def test_a_lost_node_is_told_before_the_errors_that_it_caused() -> None:
    text = summary([ended(0, error=LOST)], trouble="node1 is lost")
    assert text.splitlines()[0] == "error: node1 is lost"
    assert "failed first" not in text
    assert "failed first" in summary([ended(0, error=TRACE + "ValueError: bad")], trouble="node1 is lost")


def test_an_error_without_traceback_is_marked_as_the_end_of_stderr() -> None:
    assert "the end of its stderr:\nsome words" in summary([ended(0, error="some words", code=-11)])
    assert "SIGSEGV" in summary([ended(0, code=-11)])


def stderr_of(code: str, tmp_path: Path) -> str:
    path = tmp_path / "fails.py"
    path.write_text(code)
    return subprocess.run([sys.executable, path], capture_output=True, text=True).stderr


def test_the_traceback_is_found_with_all_that_it_is_chained_to(tmp_path: Path) -> None:
    noise = "import sys, traceback\ntry: 1/0\nexcept Exception: traceback.print_exc()\nprint('x', file=sys.stderr)\n"
    code = (
        noise
        + "try:\n  try: {}['a']\n  except KeyError as e: raise ValueError('b') from e\nfinally: int('c')"
    )
    error = error_in(stderr_of(code, tmp_path))
    assert error.startswith("Traceback")
    assert "ZeroDivisionError" not in error
    assert [word in error for word in ("KeyError: 'a'", "ValueError: b", "invalid literal")] == [True] * 3
    assert exception_line(error) == "ValueError: invalid literal for int() with base 10: 'c'"


def test_torchs_rank_prefix_does_not_hide_the_traceback() -> None:
    prefixed = "".join(f"[rank3]: {line}\n" for line in (TRACE + "E: e").splitlines())
    assert error_in("words\n" + prefixed) == TRACE + "E: e"


def test_what_stderr_says_after_the_traceback_does_not_name_the_error() -> None:
    assert (
        exception_line(error_in(TRACE + "ValueError: bad\nsome library says goodbye\n")) == "ValueError: bad"
    )


def test_a_crash_of_the_interpreter_is_found(tmp_path: Path) -> None:
    code = "import faulthandler, os, signal; faulthandler.enable(); os.kill(os.getpid(), signal.SIGSEGV)"
    error = error_in("words\n" + stderr_of(code, tmp_path))
    assert error.startswith("Fatal Python error: Segmentation fault")
    assert exception_line(error) == "Fatal Python error: Segmentation fault"


def test_a_long_traceback_keeps_its_ends() -> None:
    error = error_in(TRACE + "".join(f"  frame {i}\n" for i in range(5000)) + "RecursionError: deep")
    assert len(error.splitlines()) < 100
    assert error.startswith("Traceback")
    assert error.endswith("RecursionError: deep")


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "{}", '{"message": {}}'])
def test_a_damaged_error_file_is_no_error(text: str) -> None:
    assert recorded_error(text) == ""


def test_an_error_file_may_hold_text_or_a_record() -> None:
    assert recorded_error('{"message": "words"}') == "words"
    record = {"message": "E: e", "extraInfo": {"py_callstack": TRACE, "timestamp": "1"}}
    assert recorded_error(json.dumps({"message": record})) == TRACE.strip()


def test_ranks_are_listed_as_ranges() -> None:
    assert ranges([5, 3, 4, 0, 9, 8]) == "0, 3-5, 8-9"
    assert ranges([]) == ""
