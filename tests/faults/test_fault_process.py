"""What happens to processes, seen from outside: dead, still or slow, where and when the plan says."""

import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from distrain.core.errors import ConfigError
from distrain.faults.inject import FaultPlan, arm, effects
from distrain.faults.inject.capabilities import probe
from helpers.victims import Scene, left_groups, wait_until

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def lacks() -> Callable[[str], str]:
    """What this machine lacks for a capability."""
    return probe().lacks


def needed(lacks: Callable[[str], str], name: str) -> None:
    if missing := lacks(name):
        pytest.skip(missing)


def test_a_killed_rank_dies_in_its_step_and_the_others_live(scene: Scene) -> None:
    with scene.injector(FaultPlan().kill(ranks=[1]).at(step=5)) as injector:
        other, victim = scene.victim(injector, rank=0), scene.victim(injector, rank=1)
        assert victim.wait() == -signal.SIGKILL
        assert victim.last_step == 4
        other.reach(10)
        (record,) = scene.records()
    assert (record.kind, record.victim, record.pid, record.step) == ("proc.sigkill", 1, victim.pid, 5)


def test_a_kill_by_the_clock_comes_when_nobody_passes_a_point(scene: Scene) -> None:
    """The victim hangs in its first step: only somebody else can hit it."""
    with scene.injector(FaultPlan().kill(ranks=[0]).at(after_s=0.2)) as injector:
        victim = scene.victim(injector, work="time.sleep(1000)")
        assert victim.wait() == -signal.SIGKILL
        (record,) = scene.records()
    assert record.pid == victim.pid


def test_a_stopped_rank_stands_still_and_goes_on_after_its_time(scene: Scene) -> None:
    with scene.injector(FaultPlan().inject("proc.sigstop", ranks=[0]).at(step=3).lasting(0.5)) as injector:
        victim = scene.victim(injector)
        scene.until_fired()
        wait_until(lambda: victim.state == "T", "stop")
        assert victim.last_step == 2
        (lifted,) = scene.until_fired(event="lifted")
        victim.reach(5)
    (fired,) = scene.records()
    assert lifted.mono_ns - fired.mono_ns >= 0.5e9


def test_a_rank_that_was_stopped_for_good_goes_on_when_the_drill_is_over(scene: Scene) -> None:
    with scene.injector(FaultPlan().inject("proc.sigstop", ranks=[0]).at(step=3)) as injector:
        victim = scene.victim(injector)
        wait_until(lambda: scene.records() and victim.state == "T", "stop")
    victim.reach(5)


def test_a_frozen_rank_does_not_even_take_signals(scene: Scene, lacks: Callable[[str], str]) -> None:
    needed(lacks, "freezer")
    with scene.injector(FaultPlan().inject("cgroup.freeze", ranks=[0]).at(step=3).lasting(0.5)) as injector:
        victim = scene.victim(injector)
        scene.until_fired()
        wait_until(lambda: b"distrain-fault" in Path(f"/proc/{victim.pid}/cgroup").read_bytes(), "group")
        os.kill(victim.pid, signal.SIGTERM)
        code = victim.wait()
        lifted = scene.until_fired(event="lifted")
    (fired,) = scene.records()
    assert code == -signal.SIGTERM and victim.last_step == 2
    assert lifted[0].mono_ns - fired.mono_ns >= 0.5e9


def test_a_frozen_rank_that_is_to_be_killed_is_let_go(scene: Scene, lacks: Callable[[str], str]) -> None:
    needed(lacks, "freezer")
    with scene.injector(FaultPlan().inject("cgroup.freeze", ranks=[0]).at(step=3)) as injector:
        victim = scene.victim(injector)
        scene.until_fired()
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL


def cpu_share(pid: int, *, over_s: float) -> float:
    """Of one core, that a process gets."""

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before, start = ticks(), time.monotonic()
    time.sleep(over_s)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start)


@pytest.mark.parametrize("how", ["quota", "turns"])
def test_a_throttled_rank_gets_its_share_and_then_all_again(
    scene: Scene, lacks: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "quota":
        needed(lacks, "cpu")
    else:
        monkeypatch.setattr(effects, "find_controller", lambda name: None)
    plan = FaultPlan().inject("proc.cpu_throttle", ranks=[0], quota=0.1).at(step=3)
    with scene.injector(plan) as injector:
        victim = scene.victim(injector, work="sum(range(20_000))")
        scene.until_fired()
        step = victim.last_step
        assert cpu_share(victim.pid, over_s=1.5) < 0.2
        victim.reach(step + 1)  # slow, not stopped
    wait_until(lambda: cpu_share(victim.pid, over_s=0.3) > 0.2, "full speed")


def test_out_of_memory_is_what_the_kernel_makes_of_it(scene: Scene, lacks: Callable[[str], str]) -> None:
    needed(lacks, "memory")
    with scene.injector(FaultPlan().inject("proc.oom", ranks=[0], headroom_mib=32).at(step=3)) as injector:
        victim = scene.victim(injector)
        assert victim.wait() == -signal.SIGKILL
        (record,) = scene.until_fired()
        assert num_oom_kills() == 1
    assert (record.pid, victim.last_step) == (victim.pid, 2)


def num_oom_kills() -> int:
    """Processes that died of it in control groups of ours."""
    files = [
        path
        for group in left_groups(os.getpid())
        for path in (group / "memory.oom_control", group / "memory.events")
        if path.exists()
    ]
    words = [line.split() for path in files for line in path.read_text().splitlines()]
    return sum(int(value) for key, value in words if key == "oom_kill")


def test_an_exit_has_its_code_and_does_nothing_else(scene: Scene) -> None:
    with scene.injector(FaultPlan().inject("proc.exit", ranks=[0], code=17).at(step=3)) as injector:
        victim = scene.victim(injector, work="import atexit; atexit.register(print, 'bye', file=sys.stderr)")
        assert victim.wait() == 17
    assert (victim.last_step, victim.errors) == (2, "")
    (record,) = scene.records()
    assert (record.pid, record.step, record.detail) == (victim.pid, 3, {"code": 17})


def test_an_exception_comes_out_of_the_step(scene: Scene) -> None:
    with scene.injector(
        FaultPlan().inject("proc.exception", ranks=[0], message="bad luck").at(step=3)
    ) as injector:
        victim = scene.victim(injector)
        assert victim.wait() == 1
    assert victim.last_step == 2
    assert victim.errors.rstrip().endswith("InjectedFault: bad luck")


TICKER = """
        if step == 1:
            import threading
            def tick(done=os.open(sys.argv[1] + ".ticks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
                while True:
                    os.write(done, b"%d\\n" % time.monotonic_ns())
                    time.sleep(0.001)
            threading.Thread(target=tick, daemon=True).start()
        time.sleep(0.05)
"""


def test_a_hogged_interpreter_stops_other_threads_too(scene: Scene) -> None:
    plan = FaultPlan().inject("proc.gil_hog", ranks=[0]).at(step=4).lasting(0.7)
    with scene.injector(plan) as injector:
        victim = scene.victim(injector, work=TICKER)
        victim.reach(6)
    (record,) = scene.records()
    ticks = [int(line) for line in (scene.folder / "victim0/steps.ticks").read_text().split()]
    gaps = {after - before: before for before, after in pairwise(ticks)}
    assert max(gaps) >= 0.65e9
    assert abs(gaps[max(gaps)] - record.mono_ns) < 0.3e9


def test_a_job_that_is_launched_again_does_not_meet_the_same_fault(scene: Scene) -> None:
    plan = FaultPlan().kill(ranks=[0]).at(step=3).inject("proc.exit", ranks=[0]).at(step=6)
    with scene.injector(plan) as injector:
        assert scene.victim(injector).wait() == -signal.SIGKILL
        again = scene.victim(injector, first_step=2)
        assert again.wait() == 1
        assert again.last_step == 5
        third = scene.victim(injector, first_step=5)
        third.reach(10)
    assert [record.fault for record in scene.records()] == [0, 1]


def test_what_chance_spares_lives(scene: Scene) -> None:
    plan = FaultPlan(seed=3).kill(ranks=range(4)).at(step=2).with_probability(0.5)
    drawn = [plan.is_drawn(0, rank) for rank in range(4)]
    assert len(set(drawn)) == 2
    with scene.injector(plan) as injector:
        victims = [scene.victim(injector, rank=rank) for rank in range(4)]
        for victim, is_drawn in zip(victims, drawn, strict=True):
            if is_drawn:
                assert victim.wait() == -signal.SIGKILL
            else:
                victim.reach(5)
    assert {record.victim for record in scene.records()} == {r for r, hit in enumerate(drawn) if hit}


def test_without_a_plan_nothing_is_armed() -> None:
    with arm(environ={}) as armed:
        assert armed.faults == ()


def test_a_fault_from_outside_needs_somebody_there(scene: Scene) -> None:
    injector = scene.injector(FaultPlan().kill(ranks=[0]))
    with injector:
        pass
    with pytest.raises(ConfigError, match="comes from outside") as caught:
        arm(environ={**injector.variables, "RANK": "0"})
    assert "Injector" in caught.value.problems[0].hint
    with arm(environ={**injector.variables, "RANK": "1"}) as armed:
        assert armed.faults == []


def test_an_injector_that_ends_early_lets_its_victims_go_on(scene: Scene) -> None:
    wait = "while step == 2 and not os.path.exists(sys.argv[1] + '.go'): time.sleep(0.002)"
    with scene.injector(FaultPlan().kill(ranks=[0]).at(step=5)) as injector:
        victim = scene.victim(injector, work=wait)
        victim.reach(1)
    (scene.folder / "victim0/steps.go").touch()
    victim.reach(10)
    (record,) = scene.records("failed")
    assert record.detail == {"reason": "the injector is gone"}
