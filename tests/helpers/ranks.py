"""Runs a function as N ranks of a real gloo process group, in a fraction of a second.

A spawned rank pays two seconds for ``import torch``. Here one fork server has imported it already, and every rank is
a fork of that server: four ranks with a collective cost about 0.2 s. The server itself never initialises a process
group nor touches CUDA, so that each rank may.

A rank can end in four ways (a result, an exception, a sudden death, silence), and all of them reach the test: the
exception that came first is raised with its traceback, a silent rank shows where each of its threads stands before
it is killed, and the ranks that wait for a failed one are stopped soon after it.
"""

import contextlib
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "numpy",
    "pytest",
    "hypothesis",
]
COLLECTIVE_TIMEOUT_S = 100.0
GRACE_S = 1.0  # how long the others may go on after the first failure, to say what happened to them
DUMP_S = 10.0


class RankFailure(AssertionError):
    """At least one rank failed. ``failures`` maps each failed rank to its traceback, ``first`` is the earliest."""

    def __init__(self, failures: "dict[int, _Failure]", world_size: int) -> None:
        self.first = min(failures, key=lambda rank: failures[rank].when_s)
        self.failures = {rank: failure.text for rank, failure in failures.items()}
        others = [
            f"  rank {rank}: {failure.text.strip().splitlines()[-1]}"
            for rank, failure in sorted(failures.items())
            if rank != self.first
        ]
        text = f"rank {self.first} of {world_size} failed first:\n{self.failures[self.first]}"
        super().__init__("\n".join([text, "then:", *others] if others else [text]))


@dataclass(frozen=True, slots=True)
class _Failure:
    when_s: float  # monotonic, the same clock for every process of a machine
    text: str


UNSEEN_S = 0.0  # a death is noticed late but never a consequence of another rank's failure, so it sorts first


@dataclass(slots=True)
class _Rank:
    process: ForkServerProcess
    reports: Connection
    stacks: Path


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0, backend: str = "gloo"
) -> list[Any]:
    """``[fn(rank, world_size, *args) for each rank]``, each in its own process inside one process group.

    ``fn`` is a function at the top level of a module; its arguments and results are copied with pickle (tensors by
    value). Raises ``RankFailure`` if a rank raises, dies or says nothing for ``timeout_s``.
    """
    body = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        ranks = [_start(rank, world_size, Path(folder), body, backend) for rank in range(world_size)]
        try:
            return _collect(ranks, timeout_s)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()
                rank.process.close()
                rank.reports.close()


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _start(rank: int, world_size: int, folder: Path, body: bytes, backend: str) -> _Rank:
    context = _context()
    receive, send = context.Pipe(duplex=False)
    stacks = folder / f"stacks-{rank}"
    arguments = (rank, world_size, str(folder / "store"), str(stacks), send, body, backend)
    process = context.Process(target=_main, args=arguments, name=f"rank-{rank}")
    process.start()
    send.close()
    return _Rank(process, receive, stacks)


def _main(
    rank: int, world_size: int, store: str, stacks: str, reports: Connection, body: bytes, backend: str
) -> None:
    """What a rank's process does: reports ("ok", result) or ("failed", time, traceback) as one pickle."""
    threading.Thread(target=_end_with_the_session, daemon=True).start()
    with open(stacks, "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        try:
            _join(rank, world_size, store, backend)
            fn, args = pickle.loads(body)
            report = pickle.dumps(("ok", fn(rank, world_size, *args)))
        except BaseException:
            # Before the group is torn down: the others fail by that, and must not look as if they had failed first.
            report = pickle.dumps(("failed", time.monotonic(), traceback.format_exc()))
        reports.send_bytes(report)
        _leave()
        faulthandler.unregister(signal.SIGUSR1)
    reports.close()


def _end_with_the_session() -> None:
    """A killed pytest cannot stop its ranks, and as long as they live the fork server stays too."""
    if session := multiprocessing.parent_process():
        session.join()
        os._exit(1)


def _join(rank: int, world_size: int, store: str, backend: str) -> None:
    import numpy
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _collect(ranks: list[_Rank], timeout_s: float) -> list[Any]:
    """Results of all ranks by rank; once one has failed, the others have ``GRACE_S`` left."""
    results: dict[int, Any] = {}
    failures: dict[int, _Failure] = {}
    deadline = time.monotonic() + timeout_s
    waiting = {rank.reports: index for index, rank in enumerate(ranks)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        for reports in wait(list(waiting), timeout=left):
            index = waiting.pop(reports)  # type: ignore[call-overload]
            outcome = _read(ranks[index])
            if isinstance(outcome, _Failure):
                if not failures:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                failures[index] = outcome
            else:
                (results[index],) = outcome
    silent = sorted(waiting.values())
    reason = "stopped: it was still waiting for the others" if failures else f"silent for {timeout_s:g} s"
    for index, stack in zip(silent, _dump([ranks[index] for index in silent]), strict=True):
        failures[index] = _Failure(time.monotonic(), f"{stack}\n{reason}")
    if failures:
        raise RankFailure(failures, len(ranks))
    return [results[index] for index in range(len(ranks))]


def _read(rank: _Rank) -> _Failure | tuple[Any]:
    """The report of a rank, in a tuple of one; a rank that closed its pipe without one has died."""
    try:
        kind, *rest = pickle.loads(rank.reports.recv_bytes())
    except EOFError:
        rank.process.join(DUMP_S)
        code = rank.process.exitcode
        how = (
            f"killed by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"exit code {code}"
        )
        return _Failure(UNSEEN_S, f"died without a result: {how}")
    return (rest[0],) if kind == "ok" else _Failure(*rest)


def _dump(silent: list[_Rank]) -> list[str]:
    """Where every thread of each silent rank stands, by faulthandler."""
    for rank in silent:
        if rank.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid, signal.SIGUSR1)
    deadline = time.monotonic() + DUMP_S
    while time.monotonic() < deadline and not all(map(_is_whole, silent)):
        time.sleep(0.01)
    return [_written(rank.stacks) or "no stack to show" for rank in silent]


def _is_whole(rank: _Rank) -> bool:
    """Whether the dump has come to its end, the outermost frame of the main thread."""
    return _written(rank.stacks).endswith("in <module>\n")


def _written(path: Path) -> str:
    return path.read_text() if path.exists() else ""
