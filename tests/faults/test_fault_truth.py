"""The ground truth, and who may speak to the injector."""

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from distrain.core.clock import FakeClock
from distrain.core.errors import DataError
from distrain.core.vocabulary import FaultKind
from distrain.faults.inject import FaultPlan, cgroups, injector, read_truth
from distrain.faults.inject.cgroups import NODE, Controller, Group, fellows, find_controller
from distrain.faults.inject.control import Control, encode, short_path
from distrain.faults.inject.truth import FAILED, FIRED, TruthLog, had_their_turn
from helpers.victims import ROOT, Scene, left_groups, wait_until


def test_lines_of_all_processes_are_read_in_the_order_of_their_time(tmp_path: Path) -> None:
    clock = FakeClock()
    logs = [TruthLog(tmp_path / "truth", who=who, clock=clock) for who in ("rank-1", "rank-0")]
    for number, log in enumerate([*logs, *logs]):
        clock.advance(1.0)
        log.write(FIRED, fault=number, kind=FaultKind.PROC_EXIT, victim=1, pid=7, step=3, detail={"code": 1})
    for log in logs:
        log.close()
    records = read_truth(tmp_path / "truth")
    assert [record.fault for record in records] == [0, 1, 2, 3]
    assert [record.mono_ns for record in records] == [10**9, 2 * 10**9, 3 * 10**9, 4 * 10**9]
    assert (records[0].kind, records[0].step, records[0].detail) == (FaultKind.PROC_EXIT, 3, {"code": 1})
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "truth").iterdir()} == {0o600}


def test_a_fault_that_failed_has_not_had_its_turn(tmp_path: Path) -> None:
    log = TruthLog(tmp_path, who="injector")
    for event, victim in ((FIRED, 0), (FIRED, 1), (FAILED, 1)):
        log.write(event, fault=2, kind=FaultKind.PROC_KILL, victim=victim, pid=1)
    log.close()
    assert had_their_turn(read_truth(tmp_path)) == {(2, 0)}


@pytest.mark.parametrize("line", ["{", "[]", '{"fault": 1}', '{"kind": "proc.exit", "strange": 1}'])
def test_a_damaged_truth_is_no_truth(tmp_path: Path, line: str) -> None:
    (tmp_path / "rank-0.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match="no record of a fault"):
        read_truth(tmp_path)
    assert read_truth(tmp_path / "missing") == []


@pytest.mark.processes
def test_nonsense_does_not_disturb_the_injector(scene: Scene) -> None:
    nonsense = (
        b"{\n",
        b'{"do": "inject", "fault": 99}\n',
        b"[1]\n",
        b"x" * 10_000,
        b'{"do": "inject"}\n',
        b"",
    )
    with scene.injector(FaultPlan().kill(ranks=[0]).at(step=3)) as injector:
        for text in nonsense:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
                with short_path(scene.truth_folder) as path:
                    stranger.connect(path)
                stranger.sendall(text)
                stranger.shutdown(socket.SHUT_WR)
                with suppress(ConnectionResetError):  # it has not read all of it
                    assert stranger.recv(1) == b""
        assert scene.victim(injector).wait() == -9
    assert len(scene.records()) == 1


def test_an_injector_knows_who_lives_and_leaves_only_its_plan_and_the_truth(scene: Scene) -> None:
    with scene.injector(FaultPlan()) as injector:
        victim = scene.victim(injector, rank=3, node=1)
        victim.reach(1)
        assert injector.pids("trainer") == injector.pids("trainer", node=1) == [victim.pid]
        assert injector.pids("trainer", node=0) == injector.pids("keeper") == []
        victim.end()
        wait_until(lambda: not injector.pids("trainer"), "end of the victim")
    left = {path.name for path in scene.truth_folder.iterdir()}
    assert left == {"plan.json", f"injector-{os.getpid()}.jsonl", "rank-3.jsonl"}


def test_an_exception_in_the_drill_lifts_what_lasts(scene: Scene) -> None:
    injector = scene.injector(FaultPlan().inject("proc.sigstop", ranks=[0]).at(step=2))
    with pytest.raises(KeyboardInterrupt), injector:
        victim = scene.victim(injector)
        wait_until(lambda: scene.records() and victim.state == "T", "stop")
        raise KeyboardInterrupt
    victim.reach(5)


OWNER = """
import subprocess, sys, time
from distrain.faults.inject.cgroups import Group, find_controller

group = Group(find_controller("freezer"))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
group.join(child.pid)
group.freeze()
print(child.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.processes
def test_what_a_killed_injector_has_frozen_is_let_go_by_the_next(tmp_path: Path) -> None:
    controller = find_controller("freezer")
    if controller is None:
        pytest.skip("no control group with the freezer controller can be made")
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as owner:
        assert owner.stdout
        pid = int(owner.stdout.readline())
        owner.kill()
    assert left_groups(owner.pid)
    os.kill(pid, 9)  # waits until the process may run
    assert find_controller("freezer")
    assert left_groups(owner.pid) == []
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "end of the frozen process")


def test_a_group_gives_back_the_processes_that_it_had(tmp_path: Path) -> None:
    controller = find_controller("cpu")
    if controller is None:
        pytest.skip("no control group with the cpu controller can be made")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as child:
        before = Path(f"/proc/{child.pid}/cgroup").read_text()
        with Group(controller) as group:
            group.join(child.pid)
            assert str(child.pid) in (group.path / "cgroup.procs").read_text().split()
        assert Path(f"/proc/{child.pid}/cgroup").read_text() == before
        child.kill()


@pytest.mark.parametrize("version", [1, 2])
def test_a_process_that_has_no_number_here_is_nobody_to_signal(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel lists those of another pid namespace as 0, which to ``kill`` is the caller and all beside it."""
    folder = tmp_path / f"{NODE}-1-0"
    folder.mkdir()
    (folder / "cgroup.procs").write_text("0\n17\n0\n")
    controller = Controller("freezer", folder, folder, version)
    monkeypatch.setattr(cgroups, "find_controller", lambda name: controller)
    monkeypatch.setattr(cgroups, "_home", lambda *_: folder)
    assert Group(controller, path=folder).pids() == fellows(os.getpid()) == [17]


def test_a_process_that_has_just_ended_has_no_fellows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup.procs").touch()
    monkeypatch.setattr(cgroups, "find_controller", lambda name: Controller(name, tmp_path, tmp_path, 2))
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    assert fellows(child.pid) == []


# -- who carries the packets -----------------------------------------------------------------------------------


def order(*answers: dict[str, str]) -> None:
    """Ask for a fault, and get these answers at once."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for answer in answers:
            theirs.sendall(encode(answer))
        injector._order(ours, do="impair", name="2/0", what={})


def test_a_fault_that_the_network_refuses_has_failed() -> None:
    order({"done": "2/0"})
    with pytest.raises(OSError, match="no such link"):
        order({"failed": "2/0", "reason": "no such link"})


def test_an_answer_to_what_was_asked_before_is_not_taken_for_the_one_waited_for() -> None:
    order({"failed": "1/0", "reason": "too late"}, {"done": "2/0"})
    with pytest.raises(OSError, match="no such link"):
        order({"done": "1/0"}, {"failed": "2/0", "reason": "no such link"})


def test_a_network_that_does_not_speak_the_language_has_failed() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(OSError, match="cannot be understood"):
        theirs.sendall(b"{\n")
        injector._order(ours, do="lift", name="2/0")


def test_a_network_that_answers_too_late_is_not_sent_away(scene: Scene) -> None:
    """Without the injector it would lift all that is at work."""
    with scene.injector(FaultPlan().inject("coordinator.kill")):
        control = Control.connect(scene.truth_folder, hello={"role": "network", "rank": -1, "node": -1})
        assert control
        control.tell(done="0/0")
        assert control.ask(do="inject", fault=0) == {"failed": 0}  # nobody coordinates here
        control.close()


@pytest.mark.processes
def test_who_is_to_be_hit_cannot_be_told_and_the_fault_has_failed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(pid: int) -> list[int]:
        raise ProcessLookupError(f"process {pid} has just ended")

    monkeypatch.setattr(injector, "node_of", gone)
    plan = FaultPlan().kill(node=0).at(after_s=0.0).kill(ranks=[0]).at(after_s=0.1)
    with scene.injector(plan) as running:
        assert scene.victim(running, work="time.sleep(1000)").wait() == -9
    (record,) = scene.records("failed")
    assert record.fault == 0 and "has just ended" in record.detail["reason"]
