"""What happens to packets between emulated nodes, as the nodes see it: where and when the plan says, and no longer."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

from distrain.faults.inject import FaultPlan, Injector, Record, read_truth
from helpers.keepers import alive
from helpers.networks import PINGER, SIZE, Books, Packet, need_networks
from helpers.victims import ROOT, wait_until

pytestmark = pytest.mark.processes

PLAN = (
    FaultPlan(seed=3)
    .inject("net.drop", link=(0, 1), one_way=True)
    .at(step=10)
    .lasting(0.4)
    .inject("net.loss", link=(0, 1), loss=0.4)
    .at(step=50)
    .lasting(0.8)
    .inject("net.delay", link=(0, 1), delay_ms=150, jitter_ms=20)
    .at(step=110)
    .lasting(0.5)
    .inject("net.rate", link=(0, 1), mbit_s=0.1, one_way=True)
    .at(step=150)
    .lasting(0.8)
    .inject("net.flap", link=(1, 0), period_s=0.3)
    .at(step=230)
    .lasting(1.2)
    .inject("net.partition", node=1)
    .at(step=310)
    .lasting(0.4)
    .inject("net.drop", link=(0, 1))
    .at(step=345)
    .lasting(0.3)
)
STEPS = 375


@dataclass(frozen=True, slots=True)
class Flight:
    """A job of three nodes that has met all faults of the plan."""

    books: Books
    truth: list[Record]

    def window(self, fault: int) -> tuple[int, int]:
        """From when on a fault is at work for sure, and until when."""
        begun = next(r for r in self.truth if r.fault == fault and r.event == "fired")
        asked_by = PLAN.faults[fault].target.link or (1, 0)
        assert begun.step
        began_ns = self.books.begun_ns(asked_by[0], begun.step)
        return began_ns, begun.mono_ns + round(PLAN.faults[fault].duration_s * 1e9)

    def during(self, fault: int, way: tuple[int, int]) -> list[Packet]:
        """What was sent one way while a fault was at work."""
        since_ns, until_ns = self.window(fault)
        return self.books.packets(*way, since_ns=since_ns, until_ns=until_ns)

    def after(self, fault: int, way: tuple[int, int]) -> list[Packet]:
        """What was sent one way as soon as it was over."""
        lifted = next(r for r in self.truth if r.fault == fault and r.event == "lifted")
        return self.books.packets(*way, since_ns=lifted.mono_ns, until_ns=lifted.mono_ns + 250_000_000)


@pytest.fixture(scope="module")
def flight(tmp_path_factory: pytest.TempPathFactory) -> Flight:
    need_networks()
    folder = tmp_path_factory.mktemp("flight")
    (folder / "pinger.py").write_text(PINGER)
    words = ["launch", "--emulate-nodes", "3", "--netns", str(folder / "pinger.py"), str(folder), str(STEPS)]
    with Injector(PLAN, folder / "truth") as injector:
        done = subprocess.run(
            [sys.executable, "-m", "distrain", *words],
            env={**os.environ, **injector.variables, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
        )
    assert done.returncode == 0, done.stderr
    return Flight(Books(folder, 3), read_truth(folder / "truth"))


def arrived(packets: list[Packet]) -> float:
    """The share of packets that arrived."""
    return sum(each.received_ns is not None for each in packets) / len(packets)


def test_every_fault_fires_in_its_step_and_is_over_after_its_time(flight: Flight) -> None:
    for number, fault in enumerate(PLAN.faults):
        fired, lifted = (record for record in flight.truth if record.fault == number)
        assert (fired.event, lifted.event, fired.step) == ("fired", "lifted", fault.at.step)
        assert lifted.mono_ns - fired.mono_ns >= fault.duration_s * 1e9
        for way in ((0, 1), (1, 0)):
            assert arrived(flight.after(number, way)) == 1.0


def test_a_way_is_cut_and_the_way_back_is_not(flight: Flight) -> None:
    assert arrived(flight.during(0, (0, 1))) == 0.0
    assert arrived(flight.during(0, (1, 0))) == 1.0


def test_a_link_is_cut_both_ways(flight: Flight) -> None:
    assert arrived(flight.during(6, (0, 1))) == arrived(flight.during(6, (1, 0))) == 0.0


def test_chance_loses_its_share_of_packets(flight: Flight) -> None:
    both = [*flight.during(1, (0, 1)), *flight.during(1, (1, 0))]
    assert 0.35 < arrived(both) < 0.85


def test_a_delay_is_at_least_what_the_plan_says_and_nobody_overtakes(flight: Flight) -> None:
    for way in ((0, 1), (1, 0)):
        packets = flight.during(2, way)
        assert arrived(packets) == 1.0
        assert all(each.received_ns and each.received_ns - each.sent_ns >= 150e6 for each in packets)
        assert packets == sorted(packets, key=lambda each: each.received_ns or 0)
    before = flight.after(1, (0, 1))
    assert min((each.received_ns or 0) - each.sent_ns for each in before) < 150e6


def test_a_slow_link_passes_its_rate_and_no_more(flight: Flight) -> None:
    packets = flight.during(3, (0, 1))
    times = [each.received_ns for each in packets if each.received_ns is not None]
    nbytes = (SIZE + 28) * (len(times) - 1)  # with the headers of IP and UDP
    assert 0 < nbytes / ((max(times) - min(times)) / 1e9) <= 0.1e6 / 8 * 1.01
    assert arrived(flight.during(3, (1, 0))) == 1.0


def test_a_flapping_link_goes_and_comes_back_again_and_again(flight: Flight) -> None:
    for way in ((0, 1), (1, 0)):
        turns = [
            is_there for is_there, _ in groupby(p.received_ns is not None for p in flight.during(4, way))
        ]
        assert len(turns) >= 3


def test_a_node_that_is_cut_off_reaches_nobody_and_the_others_reach_each_other(flight: Flight) -> None:
    for way in ((0, 1), (1, 0), (1, 2), (2, 1)):
        assert arrived(flight.during(5, way)) == 0.0
    for way in ((0, 2), (2, 0)):
        assert arrived(flight.during(5, way)) == 1.0


def test_other_links_never_feel_it(flight: Flight) -> None:
    for number in (0, 1, 2, 3, 4, 6):
        for way in ((0, 2), (2, 0), (1, 2), (2, 1)):
            assert arrived(flight.during(number, way)) == 1.0


# -- a node that is lost ---------------------------------------------------------------------------------------

PAIR = """
import os, select, signal, socket, sys, time
from distrain.core import netns
from distrain.core.failpoints import hit
from distrain.faults.inject import arm

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher may be quicker
if os.environ["RANK"] == "0":
    with socket.create_server((os.environ["MASTER_ADDR"], 7001)) as server:
        other, _ = server.accept()
    other.send(b"!")
    heard, is_dead = [], False
    while not heard and not is_dead:
        is_dead = os.path.exists(sys.argv[1] + "/dead")
        heard, _, _ = select.select([other], [], [], 0.5 if is_dead else 0.01)
    open(sys.argv[1] + "/heard", "w").write(str(bool(heard)))
else:
    while True:
        try:
            other = socket.create_connection((os.environ["MASTER_ADDR"], 7001))
            break
        except OSError:
            time.sleep(0.01)
    other.recv(1)
    with arm():
        for step in range(1, 10**9):
            hit("train.step", step=step)
            time.sleep(0.01)
time.sleep(100)
"""


@pytest.fixture
def pair(tmp_path: Path) -> Iterator["Pair"]:
    found = Pair(tmp_path)
    yield found
    found.close()


class Pair:
    """Two nodes with a connection between them, of which the second is lost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "pair.py").write_text(PAIR)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, injector: Injector, *flags: str) -> None:
        words = ["launch", "--emulate-nodes", "2", *flags, str(self.folder / "pair.py"), str(self.folder)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distrain", *words],
            env={**os.environ, **injector.variables, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def heard(self) -> bool:
        """Whether the first node hears of the second one's end; every process there must be dead."""
        (record,) = [record for record in self.records() if record.event == "fired"]
        wait_until(lambda: not any(alive(pid) for pid in record.detail["pids"]), "end of the node")
        (self.folder / "dead").touch()
        answer = self.folder / "heard"
        wait_until(lambda: answer.exists() and answer.read_text(), "an answer")
        return answer.read_text() == "True"

    def records(self) -> list[Record]:
        return read_truth(self.folder / "truth")

    def close(self) -> None:
        if self.process:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@pytest.mark.parametrize("flags", [(), ("--netns",)])
def test_a_lost_node_goes_without_a_word_only_if_it_has_a_network_of_its_own(
    pair: Pair, flags: tuple[str, ...]
) -> None:
    """Without one the kernel closes its connections, which tells the others at once, as no lost machine does."""
    if flags:
        need_networks()
    with Injector(FaultPlan().kill(node=1).at(step=3), pair.folder / "truth") as injector:
        pair.start(injector, *flags)
        wait_until(lambda: pair.records(), "the loss")
        assert pair.heard() == (not flags)


# -- collectives -----------------------------------------------------------------------------------------------

REDUCE = """
import sys, time
import torch
import torch.distributed as dist
from distrain.core.failpoints import hit
from distrain.faults.inject import arm

dist.init_process_group("gloo")
with arm():
    for step in range(1, 8):
        hit("train.step", step=step)
        total = torch.full((1 << 18,), float(dist.get_rank() + step))
        dist.all_reduce(total)
        assert total.unique().tolist() == [2.0 * step + 1]
        if dist.get_rank() == 0:
            print("done", step, time.monotonic_ns(), flush=True)
dist.destroy_process_group()
"""


def test_a_collective_waits_for_the_end_of_a_partition_and_is_slow_on_a_slow_link(tmp_path: Path) -> None:
    need_networks()
    (tmp_path / "reduce.py").write_text(REDUCE)
    plan = FaultPlan().inject("net.partition", node=1).at(step=3).lasting(1.0)
    plan = plan.inject("net.rate", link=(0, 1), mbit_s=20).at(step=6)
    with Injector(plan, tmp_path / "truth") as injector:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "distrain",
                "launch",
                "--emulate-nodes",
                "2",
                "--netns",
                tmp_path / "reduce.py",
            ],
            env={**os.environ, **injector.variables, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
        )
    assert done.returncode == 0, done.stderr
    words = [line.split("done ")[1].split() for line in done.stdout.splitlines() if "done" in line]
    done_ns = {int(step): int(when) for step, when in words}
    assert sorted(done_ns) == list(range(1, 8))
    partition, slow_link = (r for r in read_truth(tmp_path / "truth") if r.event == "fired")
    assert done_ns[3] - partition.mono_ns >= 1e9  # it needs what node 1 sends afterwards
    # Two of a megabyte, half of which may have been on its way already, at 2.5 MB a second.
    assert done_ns[7] - slow_link.mono_ns >= 1.5 * 2**20 / 2.5e6 * 1e9 * 0.8


STEPS_ALONE = """
from distrain.core.failpoints import hit
from distrain.faults.inject import arm

with arm():
    for step in range(1, 4):
        hit("train.step", step=step)
"""


def test_a_fault_of_the_network_without_one_is_written_down_as_failed(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(STEPS_ALONE)
    with Injector(FaultPlan().inject("net.drop", link=(0, 1)).at(step=2), tmp_path / "truth") as injector:
        subprocess.run(
            [sys.executable, "-m", "distrain", "launch", "--emulate-nodes", "2", tmp_path / "loop.py"],
            env={**os.environ, **injector.variables, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=150,
            check=True,
        )
    (record,) = read_truth(tmp_path / "truth")
    assert (record.event, record.detail) == ("failed", {"reason": "no such process"})
