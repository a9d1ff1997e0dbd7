"""The ranks of one node with their output streams: start them, watch them, signal them, say how each ended."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from .failure import HEADER, WorkerExit, error_in, recorded_error
from .job import Seat, WorkerSpec
from .options import LaunchOptions
from .output import Console, label, wants_colour
from .reaper import Reaper
from .sessions import survivors
from .stream import Stream
from .worker import Worker

ERROR_FILE = "error.json"


class Ranks:
    """All ranks that ``start`` has started on this node; ``out`` and ``err`` show what they write.

    ``folder`` gets a subfolder for each local rank, with its error file and its logs.
    """

    def __init__(
        self, options: LaunchOptions, seat: Seat, *, folder: Path, out: Console, err: Console
    ) -> None:
        self.workers: list[Worker] = []
        self.stopped_at = float("inf")
        """when the first signal to stop was sent, in seconds since the epoch"""
        self._options = options
        self._seat = seat
        self._folder = folder
        self._out = out
        self._err = err
        self._streams: list[list[Stream]] = []
        self._reaper = Reaper()

    def start(self, spec: WorkerSpec, *, environ: Mapping[str, str]) -> None:
        """Start one rank; ``environ`` decides on colours."""
        opts = self._options
        folder = self._folder / str(spec.local_rank)
        folder.mkdir(parents=True)
        plain = opts.plain_rank == spec.rank or self._seat.world_size == 1
        shown = not opts.shown_ranks or spec.local_rank in opts.shown_ranks
        redirected, teed = (which[spec.local_rank] if which else 0 for which in (opts.redirects, opts.tee))
        own_stdout = plain and shown and not (redirected | teed) & 1
        env = {**spec.env, "TORCHELASTIC_ERROR_FILE": str(folder / ERROR_FILE)}
        worker = Worker(spec, opts.command, env=env, own_stdout=own_stdout)
        streams = []
        for bit, name, pipe, console in zip(
            (1, 2), ("stdout", "stderr"), worker.pipes, (self._out, self._err), strict=True
        ):
            if pipe is not None:
                streams.append(
                    Stream(
                        pipe,
                        console=console if shown and not redirected & ~teed & bit else None,
                        prefix=None if plain else self._prefix(spec.rank, console=console, environ=environ),
                        log=folder / f"{name}.log" if (redirected | teed) & bit else None,
                        errors=self._err,
                    )
                )
        self._reaper.watch(worker.pid)
        self.workers.append(worker)
        self._streams.append(streams)

    def open_streams(self) -> Iterator[Stream]:
        """Streams to read from now: those not at their end, and whose reader keeps up."""
        return (each for streams in self._streams for each in streams if not each.closed and not each.blocked)

    @property
    def running(self) -> int:
        """How many ranks have not ended."""
        return sum(worker.exit_code is None for worker in self.workers)

    def signal(self, signum: int) -> None:
        """Send ``signum`` to the ranks alone."""
        for worker in self.workers:
            worker.signal(signum)

    def stop(self, signum: int) -> None:
        """Send ``signum`` to the ranks and to everything they have started, to end them."""
        self.stopped_at = min(self.stopped_at, time.time())
        for pid in self.survivors():
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def survivors(self) -> list[int]:
        """Processes in the ranks' sessions that still live."""
        return survivors({worker.pid for worker in self.workers})

    def ended(self) -> tuple[WorkerExit, ...]:
        """How those ended that have, as far as is known."""
        pairs = zip(self.workers, self._streams, strict=True)
        return tuple(self._exit(*pair) for pair in pairs if pair[0].exit_code is not None)

    def finish(self) -> tuple[WorkerExit, ...]:
        """Pass on the last output of all ranks; how each ended (a rank that SIGKILL did not end counts as killed)."""
        now = time.time()
        for stream in (each for streams in self._streams for each in streams):
            stream.finish(now=now)
        return tuple(self._exit(*pair) for pair in zip(self.workers, self._streams, strict=True))

    def close(self) -> None:
        """Let the processes and pipes go; what still runs is killed."""
        self._reaper.close()
        for worker in self.workers:
            worker.close()

    def _exit(self, worker: Worker, streams: list[Stream]) -> WorkerExit:
        folder = self._folder / str(worker.spec.local_rank)
        code = -signal.SIGKILL if worker.exit_code is None else worker.exit_code
        error, at = _error(folder / ERROR_FILE, streams[-1]) if code else ("", 0.0)
        return WorkerExit(
            rank=worker.spec.rank,
            local_rank=worker.spec.local_rank,
            node=self._seat.nodes[self._seat.node_rank],
            pid=worker.pid,
            code=code,
            at=min(at or worker.exited_at, worker.exited_at),
            error=error,
            log=str(folder) if any(folder.glob("*.log")) else "",
            stopped=worker.exit_code is None or worker.exited_at > self.stopped_at,
        )

    def _prefix(self, rank: int, *, console: Console, environ: Mapping[str, str]) -> bytes:
        if not self._options.prefix:
            return b""
        colour = wants_colour(console.fd, environ=environ)
        return label(rank, world_size=self._seat.world_size, node=self._options.node_name, colour=colour)


def _error(recorded: Path, stderr: Stream) -> tuple[str, float]:
    """The rank's error, and when it happened (0: unknown), from the file that ``@record`` writes or from stderr."""
    if recorded.is_file():
        error = recorded_error(recorded.read_text(errors="replace"))
        if error:
            return error, recorded.stat().st_mtime  # finer than the whole seconds inside
    error = error_in(stderr.tail.text)
    return error, stderr.tail.traceback_at if HEADER in error else 0.0
