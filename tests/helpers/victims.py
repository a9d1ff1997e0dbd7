"""Victims: processes that do what a trainer does as far as faults can tell, and can be looked at from outside."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from distrain.faults.inject import FaultPlan, Injector, Record, read_truth

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 45.0
CGROUPS = Path("/sys/fs/cgroup")

LOOP = """
import os, sys, time
from distrain.core.failpoints import hit
from distrain.faults.inject import arm

done = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
with arm():
    for step in range(int(sys.argv[2]), 10**9):
        hit("train.step", step=step)
        os.write(done, b"%d\\n" % step)
        {work}
"""


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll ``condition`` until it holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"never happened: {what}")
        time.sleep(0.005)


class Victim:
    """A rank that takes steps for ever."""

    def __init__(self, folder: Path, variables: Mapping[str, str], *, first_step: int, work: str) -> None:
        self._steps = folder / "steps"
        self._errors = folder / "stderr"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LOOP.format(work=work), str(self._steps), str(first_step)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
            )
        self.pid = self.process.pid

    @property
    def last_step(self) -> int:
        """The last step that it has finished."""
        words = self._steps.read_text().split() if self._steps.exists() else []
        return int(words[-1]) if words else 0

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    @property
    def state(self) -> str:
        """As the kernel says: R, S, T, D, Z."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def reach(self, step: int) -> None:
        wait_until(lambda: self.last_step >= step, f"step {step}, at {self.last_step}: {self.errors}")

    def wait(self) -> int:
        """Its exit code; minus a signal."""
        return self.process.wait(DEADLINE_S)

    def end(self) -> None:
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait()


class Scene:
    """One job's folder, its plan, and the victims in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.truth_folder = folder / "truth"
        self.victims: list[Victim] = []

    def injector(self, plan: FaultPlan) -> Injector:
        return Injector(plan, self.truth_folder)

    def victim(
        self,
        injector: Injector,
        *,
        rank: int = 0,
        node: int = 0,
        first_step: int = 1,
        work: str = "time.sleep(0.002)",
    ) -> Victim:
        folder = self.folder / f"victim{len(self.victims)}"
        folder.mkdir()
        place = {"RANK": str(rank), "GROUP_RANK": str(node)}
        self.victims.append(Victim(folder, {**injector.variables, **place}, first_step=first_step, work=work))
        return self.victims[-1]

    def records(self, event: str = "fired") -> list[Record]:
        return [record for record in read_truth(self.truth_folder) if record.event == event]

    def until_fired(self, num: int = 1, *, event: str = "fired") -> list[Record]:
        wait_until(lambda: len(self.records(event)) >= num, f"{num} x {event}")
        return self.records(event)


def left_groups(owner: int) -> list[Path]:
    """Control groups that a process has made."""
    return [path for path in CGROUPS.glob(f"**/distrain-fault-{owner}-*") if path.is_dir()]
