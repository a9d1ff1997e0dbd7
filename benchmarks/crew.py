"""Ranks that wait for orders: one process group a contender, all of them alive at once, one of them at work at a time.

Contenders that shared processes would share torch's allocator, its patched functions and a half-used cache; contenders
that ran one after the other would not meet the same machine. So each has a crew of its own, started once, and every
round goes through all crews::

    round 0   ours ██░░░░  torch ░░██░░  deepspeed ░░░░██      ██ at work   ░░ blocked on a pipe, no CPU
    round 1   ours ██░░░░  torch ░░██░░  deepspeed ░░░░██

What a crew does is a function of one rank that makes a worker; orders are calls of the worker's methods by name. Output
of the ranks goes to files, whose ends are shown when one fails.
"""

import datetime
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from distrain.launch.environ import HEAP
from distrain.launch.tether import tie_to_parent

from .fixed_speed import FixedSpeed

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.distributed.pipelining",
    "torch.distributed.fsdp",
]
TIMEOUT_S = 300.0


class CrewError(RuntimeError):
    """A rank raised, died or stayed silent."""


class Crew:
    """``world_size`` processes, each of which has made a worker by ``make(rank, world_size, *args)``."""

    def __init__(
        self, name: str, folder: Path, ranks: Sequence[ForkServerProcess], pipes: Sequence[Connection]
    ) -> None:
        self.name = name
        self._folder = folder
        self._ranks = ranks
        self._pipes = pipes

    def ready(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until all ranks have made their workers; once, before anything else."""
        self._collect(timeout_s)

    def join(self, devices: FixedSpeed) -> None:
        """Put each rank on a device of its own."""
        for device, rank in enumerate(self._ranks):
            assert rank.pid is not None
            devices.join(device, rank.pid)

    def call(self, method: str, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Results of ``worker.method(*args)`` of all ranks, which run it at the same time."""
        for pipe in self._pipes:
            pipe.send((method, args))
        return self._collect(timeout_s)

    def _collect(self, timeout_s: float) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(self._pipes):
            waiting = [pipe for i, pipe in enumerate(self._pipes) if i not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise CrewError(f"{self.name}: silent for {timeout_s:g} s\n{self._output()}")
            for rank, pipe in enumerate(self._pipes):
                if pipe not in ready:
                    continue
                try:
                    ok, answer = pipe.recv()
                except EOFError:
                    raise CrewError(f"{self.name}: rank {rank} died\n{self._output()}") from None
                if not ok:
                    raise CrewError(f"{self.name}: rank {rank} failed\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(len(self._pipes))]

    def _output(self, num_lines: int = 20) -> str:
        lines = [
            line for path in sorted(self._folder.glob("output-*")) for line in path.read_text().splitlines()
        ]
        return "\n".join(lines[-num_lines:])


@contextmanager
def crew(
    name: str, make: Callable[..., Any], *args: Any, world_size: int, has_children: bool = False
) -> Iterator[Crew]:
    """Start a crew, without waiting for it; its processes end with the block, whatever happened.

    ``make`` is a function at the top level of a module. With ``has_children`` workers may start processes of their
    own, which they have to end before the block does.
    """
    for key, value in HEAP.items():  # what our launcher gives to ranks, here to those of all contenders
        os.environ.setdefault(key, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="crew-") as path:
        folder, ranks, pipes = Path(path), [], []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve,
                    args=(rank, world_size, folder, theirs, make, args),
                    daemon=not has_children,
                )
                process.start()
                theirs.close()
                ranks.append(process)
                pipes.append(ours)
            yield Crew(name, folder, ranks, pipes)
        finally:
            for process, pipe in zip(ranks, pipes, strict=True):
                process.kill()
                process.join()
                pipe.close()


def _serve(
    rank: int,
    world_size: int,
    folder: Path,
    orders: Connection,
    make: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """A rank's life: join the group, make the worker, obey until the pipe closes."""
    output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        tie_to_parent(os.getppid())  # the fork server, which ends with whoever started it
        _join_group(rank, world_size, folder)
        worker = make(rank, world_size, *args)
        orders.send((True, None))
        while True:
            method, arguments = orders.recv()
            orders.send((True, getattr(worker, method)(*arguments)))
    except EOFError:
        return
    except BaseException:
        sys.stdout.flush()
        orders.send((False, traceback.format_exc()))


def _join_group(rank: int, world_size: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    store = dist.FileStore(str(folder / "store"), world_size)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
