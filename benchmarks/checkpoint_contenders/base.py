"""What all contenders share: the state they save, and how one is driven, timed and judged.

A save has three moments, and who is fast at one of them may owe it to another::

    save ── returns: forward and backward may run ── fence ── returns: the optimizer may step ── durable

The *stall* is the time within ``save`` and ``fence`` with compute between them. The worker takes each contender at its
word: as soon as ``fence`` returns, the optimizer steps, which changes every byte. Then the state is wiped, restored and
compared with what it was at ``save``: this is what ``consistent`` says.
"""

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

MATMUL = 512
"""size of the matrices of the stand-in for forward and backward"""


@dataclass(frozen=True, slots=True)
class Job:
    """``num_params`` fp32 parameters of one shape, with AdamW's two moments each."""

    num_params: int
    shape: tuple[int, int]
    compute_s: float
    """of forward and backward between ``save`` and ``fence``"""
    first_save_s: float = 5.0
    """age of a contender at its first save at least: nobody saves in the first seconds of a job"""

    @property
    def nbytes(self) -> int:
        """Of parameters and moments."""
        return 3 * self.num_params * 4 * self.shape[0] * self.shape[1]


class Training:
    """A model and an optimizer that has stepped; every step changes all that there is to save."""

    def __init__(self, job: Job) -> None:
        generator = torch.Generator().manual_seed(1)
        self.job = job
        self.model = nn.ParameterDict(
            {f"w{i}": torch.randn(job.shape, generator=generator) for i in range(job.num_params)}
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        gradient = torch.randn(job.shape, generator=generator)
        for parameter in self.model.parameters():
            parameter.grad = gradient  # one for all: it is only there to change the state
        self.optimizer.step()
        self._matrix = torch.randn(MATMUL, MATMUL, generator=generator)
        self._expected = [tensor.clone() for tensor in self.tensors().values()]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and moments by name: the live ones, not copies."""
        named = {}
        for name, parameter in self.model.items():
            named[name] = parameter.detach()
            for key in ("exp_avg", "exp_avg_sq"):
                named[f"{name}.{key}"] = self.optimizer.state[parameter][key]
        return named

    def compute(self, *, seconds: float) -> None:
        """Stand-in for forward and backward."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self._matrix @ self._matrix

    def multiply(self, *, num_times: int) -> None:
        """The same for a fixed amount of work."""
        for _ in range(num_times):
            self._matrix @ self._matrix

    def remember(self) -> None:
        """Keep a copy of the state as it is now."""
        for kept, tensor in zip(self._expected, self.tensors().values(), strict=True):
            kept.copy_(tensor)

    def wipe(self) -> None:
        """Lose the state."""
        for tensor in self.tensors().values():
            tensor.fill_(-1.0)

    def is_as_remembered(self) -> bool:
        """Whether every byte is what it was at ``remember``."""
        pairs = zip(self._expected, self.tensors().values(), strict=True)
        return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


class Contender(Protocol):
    """One way to save and restore a ``Training`` in a folder of its own."""

    overlaps: bool
    """whether training goes on before all is durable"""

    def save(self, step: int) -> None:
        """Begin to save the state as it is now; forward and backward may run afterwards."""

    def fence(self) -> None:
        """Return when the optimizer may step."""

    def durable(self) -> None:
        """Return when the step is on disk, synced."""

    def restore(self, step: int) -> None:
        """Read the step from disk into the training's tensors."""

    def close(self) -> None:
        """End whatever runs."""


Factory = Callable[[Training, Path], Contender]


@dataclass(slots=True)
class Stopwatch:
    """Adds up the time within its blocks."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of this block."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


class Worker:
    """Drives a contender; the methods are what a crew is asked for."""

    def __init__(self, factory: Factory, job: Job, folder: Path) -> None:
        torch.set_num_threads(1)
        folder.mkdir(parents=True)
        self._folder = folder
        self._training = Training(job)
        self._contender = factory(self._training, folder)
        self._step, self._turns = 0, 0
        self._made = time.perf_counter()

    def turn(self) -> dict[str, float]:
        """One save of each kind and a restore: seconds, and 1.0 under ``consistent`` if all bytes came back.

        ``age_s`` is the worker's, whose contender got ready when it was made, at the first save of the turn.
        """
        if not self._step:
            self._training.compute(seconds=self._made + self._training.job.first_save_s - time.perf_counter())
        age_s = time.perf_counter() - self._made
        try:
            found = {"age_s": age_s, **self._save_and_restore()}
            if self._contender.overlaps:
                found["durable_s"] = self._save_at_once()
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell; no helper may stay behind
                self._contender.close()
            raise
        self._clean()
        return found

    def train(self, num_steps: int, multiplications: int) -> dict[str, float]:
        """Seconds a step of training with a save at every step (``with_s``), and of training without."""
        times = {False: 0.0, True: 0.0}
        self._turns += 1
        for saving in (True, False) if self._turns % 2 else (False, True):
            start = time.perf_counter()
            for _ in range(num_steps):
                if saving:
                    self._save()
                self._training.multiply(num_times=multiplications)
                if saving:
                    self._contender.fence()
                self._training.optimizer.step()
            times[saving] = (time.perf_counter() - start) / num_steps
            if saving:
                self._contender.durable()
                self._clean()
        return {"with_s": times[True], "without_s": times[False]}

    def calibrate(self, seconds: float) -> int:
        """How many multiplications take about this long here."""
        start = time.perf_counter()
        self._training.multiply(num_times=40)
        return max(1, round(40 * seconds / (time.perf_counter() - start)))

    def grow(self, num_saves: int) -> dict[str, int]:
        """Resident bytes of this process and its helpers after ``num_saves`` saves."""
        for _ in range(num_saves):
            self._save()
            self._contender.fence()
            self._training.optimizer.step()
            self._contender.durable()
        helpers: Callable[[], list[int]] = getattr(self._contender, "helpers", list)
        return {str(place): _resident_bytes(pid) for place, pid in enumerate([os.getpid(), *helpers()])}

    def close(self) -> None:
        """End what the contender has started."""
        self._contender.close()

    def _save(self) -> None:
        self._step += 1
        self._contender.save(self._step)

    def _save_and_restore(self) -> dict[str, float]:
        stall, durable, restore, recall = Stopwatch(), Stopwatch(), Stopwatch(), Stopwatch()
        training, contender = self._training, self._contender
        training.optimizer.step()
        training.remember()
        gc.collect()
        with durable.running(), stall.running():
            self._save()
        if contender.overlaps:
            training.compute(seconds=training.job.compute_s)
        with durable.running(), stall.running():
            contender.fence()
        if contender.overlaps:
            training.optimizer.step()
        with durable.running():
            contender.durable()
        _leave_page_cache(self._folder)
        training.wipe()
        with restore.running():
            contender.restore(self._step)
        found = {
            "stall_s": stall.seconds,
            "durable_s": durable.seconds,
            "restore_s": restore.seconds,
            "consistent": float(training.is_as_remembered()),
        }
        if hasattr(contender, "recall"):
            training.wipe()
            with recall.running():
                contender.recall(self._step)
            found["recall_s"] = recall.seconds
            found["consistent"] *= training.is_as_remembered()
        return found

    def _save_at_once(self) -> float:
        """Seconds until a save is durable with nothing in its way."""
        watch = Stopwatch()
        with watch.running():
            self._save()
            self._contender.fence()
            self._contender.durable()
        return watch.seconds

    def _clean(self) -> None:
        """Delete what is left to whoever saves to delete; ours keeps its own house."""
        for path in self._folder.glob("[0-9]*"):
            shutil.rmtree(path)


def make_worker(rank: int, world_size: int, factory: Factory, job: Job, folder: Path) -> Worker:
    """What the process of a crew runs."""
    return Worker(factory, job, folder)


def sync_files(folder: Path) -> None:
    """fsync all files below ``folder``, and the folders."""
    for path in (folder.parent, folder, *folder.rglob("*")):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _leave_page_cache(folder: Path) -> None:
    """So that nobody restores from it. Old steps may go while we look."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                fd = os.open(Path(parent, name), os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def _resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
