"""Start the launcher as its user does, as a process, and look at what it prints and leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

DEADLINE_S = 45.0  # of the 60 that a test may take
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("PET_", "OMP_"))}


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll ``condition`` until it holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"never happened: {what}")
        time.sleep(0.01)


class Job:
    """A running launcher."""

    def __init__(self, argv: list[str], *, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self.environ = {**CLEAN, **env}
        self._out, self._err = folder / "stdout", folder / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "distrain", "launch", *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=self.environ,
                cwd=folder,
                start_new_session=True,
            )

    @property
    def out(self) -> bytes:
        return self._out.read_bytes()

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def lines(self) -> list[str]:
        return self.out.decode(errors="replace").splitlines()

    def until(self, text: str, *, times: int = 1) -> None:
        """Wait until the ranks have printed ``text`` so many times."""
        wait_until(
            lambda: self.out.count(text.encode()) >= times, f"{times} x {text!r} in {self.out!r} {self.err}"
        )

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(timeout=DEADLINE_S)

    def pids(self) -> list[int]:
        """Process ids that ranks printed as ``pid N``."""
        return [int(line.rpartition("pid ")[2]) for line in self.lines if "pid " in line]


Launch = Callable[..., Job]
Script = Callable[[str], str]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts ``distrain launch`` with the given words; what still runs at the end is killed."""
    jobs: list[Job] = []
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's "ignore" would reach the job

    def start(*argv: str, env: Mapping[str, str] | None = None) -> Job:
        folder = tmp_path / f"job{len(jobs)}"
        folder.mkdir()
        jobs.append(Job(list(argv), folder=folder, env=env or {}))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            os.kill(job.process.pid, signal.SIGKILL)
            job.process.wait()
    signal.signal(signal.SIGHUP, hangup)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Writes a script, with ``os``, ``sys``, ``time``, ``signal`` and ``rank`` at hand, and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / f"script{len(list(tmp_path.glob('*.py')))}.py"
        path.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{text}\n")
        return str(path)

    return write


def is_gone(pid: int) -> bool:
    """Whether a process is no more, or only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except OSError:
        return True


@pytest.fixture
def all_gone() -> Callable[[list[int]], None]:
    """Waits until none of the given processes lives."""
    return lambda pids: wait_until(lambda: all(is_gone(pid) for pid in pids), f"end of {pids}")


@pytest.fixture
def until() -> Callable[[Callable[[], object], str], None]:
    """Polls a condition until it holds."""
    return wait_until
