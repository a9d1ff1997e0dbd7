"""Devices of fixed speed: makespan shows, nobody exceeds a quota, and nothing is left behind however it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cgroups import PREFIX, Controller, find_controller
from benchmarks.fixed_speed import BALANCED, FixedSpeed, fixed_speed, skew_ratio

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
BUSY = "while True: pass"
DEADLINE_S = 20.0


@pytest.fixture
def controller() -> Controller:
    """The CPU controller of this machine, if this user may make groups there."""
    found = find_controller()
    if found is None:
        pytest.skip("no cgroup with a CPU quota can be made here")
    return found


@pytest.fixture(params=["cgroups", "signals"])
def signals(request: pytest.FixtureRequest) -> bool:
    if request.param == "cgroups":
        request.getfixturevalue("controller")
    return bool(request.param == "signals")


def groups(controller: Controller, pid: int) -> list[Path]:
    return list(controller.root.glob(f"{PREFIX}-{pid}-*"))


def cpu_s(pid: int) -> float:
    return time.clock_gettime((~pid << 3) | 2)


def wait_until_busy(pid: int) -> None:
    """The process has started up and spends CPU time."""
    deadline = time.monotonic() + DEADLINE_S
    while cpu_s(pid) < 0.1:
        assert time.monotonic() < deadline, "the process does not run"
        time.sleep(0.01)


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", BUSY])
    yield process
    process.kill()
    process.wait()


@pytest.mark.alone
@pytest.mark.slow
def test_a_plan_skewed_four_to_one_takes_more_than_three_times_as_long(controller: Controller) -> None:
    ratios = []
    for _ in range(5):  # another process in the wrong moment slows the balanced plan, which needs all cores
        with fixed_speed(len(BALANCED)) as devices:
            assert devices.kind.startswith("cgroup")
            ratios.append(skew_ratio(devices, rounds=3, loops=2_000_000))
        if ratios[-1] > 3:
            return
    pytest.fail(f"skewed over balanced: {ratios}")


def test_a_device_never_gets_more_than_its_quota(signals: bool, busy: subprocess.Popen[bytes]) -> None:
    with fixed_speed(8, signals=signals) as devices:
        wait_until_busy(busy.pid)
        devices.join(3, busy.pid)
        start, used = time.monotonic(), cpu_s(busy.pid)
        while cpu_s(busy.pid) - used < 20 * 0.01 * devices.quota:  # twenty periods
            assert time.monotonic() < start + DEADLINE_S, "the device stands still"
            time.sleep(0.001)
        assert cpu_s(busy.pid) - used < 1.5 * devices.quota * (time.monotonic() - start)


def test_processes_on_one_device_share_its_speed(signals: bool, busy: subprocess.Popen[bytes]) -> None:
    other = subprocess.Popen([sys.executable, "-I", "-S", "-c", BUSY])
    try:
        with fixed_speed(8, signals=signals) as devices:
            for process in (busy, other):
                wait_until_busy(process.pid)
                devices.join(0, process.pid)
            start, used = time.monotonic(), cpu_s(busy.pid) + cpu_s(other.pid)
            while cpu_s(busy.pid) + cpu_s(other.pid) - used < 20 * 0.01 * devices.quota:
                assert time.monotonic() < start + DEADLINE_S, "the device stands still"
                time.sleep(0.001)
            together = cpu_s(busy.pid) + cpu_s(other.pid) - used
            assert together < 1.5 * devices.quota * (time.monotonic() - start)
    finally:
        other.kill()
        other.wait()


def test_a_failure_inside_leaves_full_speed_and_no_group(
    signals: bool, busy: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(ZeroDivisionError), fixed_speed(4, signals=signals) as devices:
        devices.join(0, busy.pid)
        raise ZeroDivisionError
    wait_until_busy(busy.pid)
    assert PREFIX not in Path(f"/proc/{busy.pid}/cgroup").read_text()
    if not signals:
        found = find_controller()
        assert found is not None and not groups(found, os.getpid())


def test_a_process_that_ends_on_its_device_disturbs_nobody(
    signals: bool, busy: subprocess.Popen[bytes]
) -> None:
    with fixed_speed(4, signals=signals) as devices:
        short = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
        devices.join(0, short.pid)
        devices.join(0, busy.pid)
        short.communicate(b"\n")
        assert short.returncode == 0
        wait_until_busy(busy.pid)


HOLDER = """
import signal, sys
from benchmarks.fixed_speed import fixed_speed
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with fixed_speed(2) as devices:
    print(devices.kind, flush=True)
    signal.pause()
"""


def start_holder() -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline().startswith("cgroup")
    return holder


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_takes_the_groups_away(controller: Controller, sent: signal.Signals) -> None:
    holder = start_holder()
    assert len(groups(controller, holder.pid)) == 2
    holder.send_signal(sent)
    holder.communicate(timeout=DEADLINE_S)
    assert not groups(controller, holder.pid)


def test_what_a_killed_owner_left_is_taken_away_by_the_next(controller: Controller) -> None:
    holder = start_holder()
    holder.kill()
    holder.communicate(timeout=DEADLINE_S)
    assert len(groups(controller, holder.pid)) == 2
    assert find_controller() is not None
    assert not groups(controller, holder.pid)


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (1, {"cpu.cfs_period_us": "10000", "cpu.cfs_quota_us": "4500", "cpu.shares": "51200"}),
        (2, {"cpu.max": "4500 10000", "cpu.weight": "5000"}),
    ],
)
def test_each_version_is_told_the_quota_in_its_own_words(
    tmp_path: Path, version: int, files: dict[str, str]
) -> None:
    group = Controller(tmp_path, tmp_path, version).create("group", quota=0.45, period_s=0.01)
    assert {path.name: path.read_text() for path in group.iterdir()} == files


def test_speed_is_kept_by_signals_where_no_group_can_be_made() -> None:
    with fixed_speed(4, signals=True) as devices:
        kept: FixedSpeed = devices
        assert kept.kind == "stopped by signals"
        assert kept.quota == pytest.approx(0.9 * len(os.sched_getaffinity(0)) / 4)
