"""A rank whose wall clock is wrong: whatever it asks for the time of day, and nothing else about it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distrain.core import native
from distrain.core.errors import ConfigError, MissingDependencyError
from distrain.faults.inject import FaultPlan, Injector, arm, check, read_truth
from distrain.faults.inject.checks import JobShape
from distrain.faults.inject.engines import clock
from helpers.victims import ROOT

pytestmark = pytest.mark.processes

HOUR_S = 3600.0
LOOK = """
import ctypes, datetime, json, multiprocessing, sys, time
from distrain.core.failpoints import hit
from distrain.faults.inject import arm

BOOT_S = float(sys.argv[1])  # wall time at monotonic zero, as a process knows it that nobody deceives
libc = ctypes.CDLL(None)

def gettimeofday():
    now = (ctypes.c_long * 2)()
    libc.gettimeofday(now, None)
    return now[0] + now[1] / 1e6

def off(told):
    return told - time.monotonic() - BOOT_S

def waited(limit_s):
    began = time.monotonic()
    assert not multiprocessing.Semaphore(0).acquire(timeout=limit_s)  # sem_timedwait, until a time of day
    return time.monotonic() - began

def look():
    return {
        "time": off(time.time()),
        "time_ns": off(time.time_ns() / 1e9),
        "clock_gettime": off(time.clock_gettime(time.CLOCK_REALTIME)),
        "datetime": off(datetime.datetime.now().timestamp()),
        "libc time": off(libc.time(None)),
        "gettimeofday": off(gettimeofday()),
        "looked_ns": time.monotonic_ns(),
    }

with arm():
    for step in range(1, 5):
        hit("train.step", step=step)
        print(json.dumps({**look(), "waited": waited(0.1)}), flush=True)
        if step == 3:
            deadline = time.monotonic() + 0.5
            while time.monotonic() < deadline:
                pass
print(json.dumps(look()), flush=True)
"""


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> None:
    try:
        clock.build()
    except MissingDependencyError as error:
        pytest.skip(str(error))


def looks(folder: Path, plan: FaultPlan, *, rank: int = 0) -> list[dict[str, float]]:
    """By how many seconds each way of asking was off, in each step and at the end."""
    boot_s = time.time() - time.monotonic()
    with Injector(plan, folder / "truth") as injector:
        done = subprocess.run(
            [sys.executable, "-c", LOOK, str(boot_s)],
            env={**os.environ, **injector.variables, "PYTHONPATH": str(ROOT), "RANK": str(rank)},
            capture_output=True,
            text=True,
            timeout=50,
        )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def are_off(look: dict[str, Any], by_s: float) -> bool:
    """``time`` tells whole seconds, and whoever asks may be held up in between."""
    return all(abs(value - by_s) < 60 for name, value in look.items() if name not in ("waited", "looked_ns"))


@pytest.mark.parametrize("offset_s", [HOUR_S, -HOUR_S])
def test_the_time_of_day_is_off_from_its_step_on_and_waits_last_as_long_as_ever(
    tmp_path: Path, offset_s: float
) -> None:
    plan = FaultPlan().inject("clock.skew", ranks=[1], offset_s=offset_s).at(step=2)
    first, *later, end = looks(tmp_path, plan, rank=1)
    assert are_off(first, 0) and are_off(end, 0)  # in the end the process is disarmed
    assert all(are_off(look, offset_s) for look in later)
    assert all(look["waited"] >= 0.095 for look in (first, *later))
    (record,) = read_truth(tmp_path / "truth")
    assert (record.victim, record.step, record.detail) == (1, 2, {"offset_s": offset_s})


def test_the_clock_is_right_again_after_the_duration_and_that_of_others_always(tmp_path: Path) -> None:
    plan = FaultPlan().inject("clock.skew", ranks=[0], offset_s=HOUR_S).at(step=3).lasting(0.4)
    *_, third, fourth, _ = looks(tmp_path / "hit", plan)
    (record,) = read_truth(tmp_path / "hit" / "truth")
    if third["looked_ns"] < record.mono_ns + 0.4e9:
        assert are_off(third, HOUR_S)
    assert are_off(fourth, 0)
    assert all(are_off(look, 0) for look in looks(tmp_path / "spared", plan, rank=1))


def test_what_else_happens_to_a_rank_is_written_down_at_the_right_time(tmp_path: Path) -> None:
    """Truth is compared with what others say, whose clocks are right."""
    plan = FaultPlan().inject("clock.skew", ranks=[0], offset_s=HOUR_S).at(step=1)
    plan = plan.inject("proc.gil_hog", ranks=[0]).at(step=2).lasting(0.01)
    looks(tmp_path, plan)
    skew, hog = read_truth(tmp_path / "truth")
    assert 0 <= hog.wall_ns - skew.wall_ns == hog.mono_ns - skew.mono_ns


def test_what_the_user_preloads_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libm.so.6")
    with Injector(FaultPlan().inject("clock.skew", ranks=[0]), tmp_path) as injector:
        ours, its = injector.variables["LD_PRELOAD"].split(":")
    assert Path(ours).is_file() and its == "libm.so.6"
    with Injector(FaultPlan().kill(ranks=[0]), tmp_path) as injector:
        assert "LD_PRELOAD" not in injector.variables


def test_a_process_that_was_started_without_it_says_so(tmp_path: Path) -> None:
    plan = FaultPlan().inject("clock.skew", ranks=[0]).at(step=1)
    with Injector(plan, tmp_path) as injector, pytest.raises(ConfigError, match="this process") as caught:
        arm(environ={**injector.variables, "RANK": "0"})
    assert "LD_PRELOAD" in str(caught.value)


def test_without_a_compiler_it_is_refused_before_the_job_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "COMPILER", "no-such-compiler")
    monkeypatch.setenv("DISTRAIN_CACHE_DIR", str(tmp_path))
    plan = FaultPlan().inject("clock.skew", ranks=[0])
    (problem,) = check(plan, JobShape(world_size=1))
    assert "does not allow" in problem.error
    assert "no-such-compiler" in problem.got and "g++" in problem.hint


@pytest.mark.parametrize("folder", ["two words", "one:other"])
def test_a_library_that_cannot_be_preloaded_is_refused_before_the_job_starts(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTRAIN_CACHE_DIR", str(tmp_path / folder))
    (problem,) = check(FaultPlan().inject("clock.skew", ranks=[0]), JobShape(world_size=1))
    assert folder in problem.got and "DISTRAIN_CACHE_DIR" in problem.hint


def test_a_cache_that_is_named_from_here_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTRAIN_CACHE_DIR", "cache")
    assert Path(clock.preload({})["LD_PRELOAD"]).is_relative_to(tmp_path)
