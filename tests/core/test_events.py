"""The event log: what it writes, what survives a kill or a full disk, and that it never stops training."""

import json
import logging
import math
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.core.clock import FakeClock
from distrain.core.errors import DataError
from distrain.core.events import VERSION, Event, EventLog, JsonlSink, read_events


class ListSink:
    """Keeps events; raises OSError while ``broken``."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.broken = False
        self.closed = 0

    def write(self, event: Event) -> None:
        if self.broken:
            raise OSError("no space")
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


def test_scalars_events_and_spans_come_back_with_time_rank_and_host(tmp_path: Path) -> None:
    clock, path = FakeClock(), tmp_path / "run" / "events.jsonl"
    with EventLog([JsonlSink(path)], rank=3, host="node7", clock=clock) as log:
        log.scalar("loss", 2.5, step=1, split="train")
        clock.advance(1)
        with log.span("evaluate", step=1, sequences=8) as attributes:
            clock.advance(2)
            attributes["loss"] = 2.25
        log.event("done", reason="steps")
    loss, evaluate, done = read_events(path)
    assert loss == Event(
        kind="scalar",
        name="loss",
        rank=3,
        host="node7",
        wall_s=clock.epoch_s,
        mono_ns=0,
        value=2.5,
        step=1,
        attributes={"split": "train"},
    )
    assert (evaluate.kind, evaluate.duration_s, evaluate.mono_ns) == ("span", 2.0, 1_000_000_000)
    assert evaluate.attributes == {"sequences": 8, "loss": 2.25}
    assert (done.kind, done.mono_ns, done.step, done.attributes) == (
        "event",
        3 * 10**9,
        None,
        {"reason": "steps"},
    )


def test_the_first_line_names_the_version_and_each_line_is_json(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog([JsonlSink(path)]) as log:
        log.event("a")
    first, second = map(json.loads, path.read_text().splitlines())
    assert first["distrain_events"] == VERSION
    assert second["name"] == "a"


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "events.jsonl").close()
    assert stat.S_IMODE((tmp_path / "events.jsonl").stat().st_mode) == 0o600


def test_a_span_that_ends_in_an_exception_is_recorded_and_the_exception_goes_on() -> None:
    sink = ListSink()
    with pytest.raises(KeyError), EventLog([sink]).span("step"):
        raise KeyError("x")
    assert sink.events[0].attributes == {"error": "KeyError"}


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(value=st.floats(), attributes=st.dictionaries(st.text(), JSON_LIKE))
def test_every_value_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, value: float, attributes: dict[str, object]
) -> None:
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    sink = JsonlSink(path)
    sink.write(
        Event(
            kind="scalar",
            name="x",
            rank=0,
            host="h",
            wall_s=0.0,
            mono_ns=0,
            value=value,
            attributes=attributes,
        )
    )
    sink.close()
    (event,) = read_events(path)
    assert event.value is not None
    assert event.value == value or (math.isnan(event.value) and math.isnan(value))
    assert event.attributes == attributes


def test_numbers_that_json_lacks_and_foreign_objects_are_written_as_text(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog([JsonlSink(path)]) as log:
        log.event("odd", nan=math.nan, inf=[math.inf], path=Path("/x"), pair=(1, 2))
    (event,) = read_events(path)
    assert event.attributes == {"nan": "nan", "inf": ["inf"], "path": "/x", "pair": [1, 2]}


def test_a_failing_sink_warns_once_counts_its_losses_and_recovers(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = ListSink(), ListSink()
    log = EventLog([bad, good])
    bad.broken = True
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            log.scalar("loss", 1.0, step=step)
    bad.broken = False
    log.scalar("loss", 1.0, step=3)
    assert [event.step for event in good.events] == [0, 1, 2, 3]
    assert [event.step for event in bad.events] == [3]
    assert log.num_dropped == 3
    assert [record.getMessage() for record in caplog.records] == ["ListSink drops events: no space"]


def test_closing_the_log_closes_every_sink() -> None:
    first, second = ListSink(), ListSink()
    with EventLog([first, second]):
        pass
    assert (first.closed, second.closed) == (1, 1)


def test_a_torn_last_line_costs_one_event_when_the_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog([JsonlSink(path)]) as log:
        for step in range(3):
            log.event("step", step=step)
    os.truncate(path, path.stat().st_size - 7)
    recorded = read_events(path)
    assert ([event.step for event in recorded], recorded.num_damaged) == ([0, 1], 1)
    with EventLog([JsonlSink(path)]) as log:
        log.event("step", step=3)
    recorded = read_events(path)
    assert ([event.step for event in recorded], recorded.num_damaged) == ([0, 1, 3], 1)


def test_a_torn_first_line_does_not_make_the_file_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"distrain_ev')
    with EventLog([JsonlSink(path)]) as log:
        log.event("a")
    recorded = read_events(path)
    assert ([event.name for event in recorded], recorded.num_damaged) == (["a"], 1)


WRITER = """
    import itertools, sys
    from distrain.core.events import EventLog, JsonlSink
    log = EventLog([JsonlSink(sys.argv[1])])
    for step in itertools.count():
        log.event("step", step=step, text="x" * 200)
"""


@pytest.mark.processes
def test_a_killed_writer_leaves_every_event_up_to_the_kill(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(2):  # the second writer goes on in the same file
        size = path.stat().st_size if path.exists() else 0
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), str(path)]) as writer:
            deadline = time.monotonic() + 30
            while not path.exists() or path.stat().st_size < size + 100_000:
                assert writer.poll() is None
                assert time.monotonic() < deadline
            writer.kill()
        assert writer.returncode == -signal.SIGKILL
    recorded = read_events(path)
    steps = [event.step for event in recorded]
    second = steps.index(0, 1)
    assert steps[:second] == list(range(second))
    assert steps[second:] == list(range(len(steps) - second))
    assert min(second, len(steps) - second) > 200
    assert recorded.num_damaged <= 2


FULL_DISK = """
    import resource, sys
    from distrain.core.events import EventLog, JsonlSink
    log = EventLog([JsonlSink(sys.argv[1])])
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    for step in range(100):
        log.event("step", step=step)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.event("after", dropped=log.num_dropped)
    log.close()
"""


@pytest.mark.processes
def test_a_file_that_cannot_grow_costs_events_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("drops events") == 1
    recorded = read_events(path)
    *steps, after = recorded
    assert [event.step for event in steps] == list(range(len(steps)))
    assert after.attributes["dropped"] == 100 - len(steps) > 0
    assert recorded.num_damaged == 1


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog([JsonlSink(path)]) as log:

        def run(thread: int) -> None:
            for step in range(200):
                log.event(f"thread{thread}", step=step, text="x" * 500)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    recorded = read_events(path)
    assert (len(recorded), recorded.num_damaged) == (800, 0)
    for number in range(4):
        assert [event.step for event in recorded if event.name == f"thread{number}"] == list(range(200))


def test_files_that_are_none_of_ours_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with pytest.raises(DataError, match="cannot be read"):
        read_events(path)
    for text, message in {
        "": "not an events file",
        "hello\n": "not an events file",
        "[1]\n": "not an events file",
        '{"distrain_events": 99}\n': "another version",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_events(path)


def test_a_sink_leaves_no_descriptor_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    JsonlSink(tmp_path / "events.jsonl").close()
    assert len(os.listdir("/proc/self/fd")) == before
