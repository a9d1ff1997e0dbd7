"""The ranks of one node with their output streams: start them, watch them, signal them, say how each ended."""

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from distrain.core.errors import LaunchError

from .failure import HEADER, WorkerExit, error_in, recorded_error
from .job import Seat, WorkerSpec
from .options import LaunchOptions
from .output import Console, label, wants_colour
from .reaper import Reaper
from .sessions import survivors
from .stream import Stream
from .worker import Worker

ERROR_FILE = "error.json"
STDOUT, STDERR = 1, 2  # as --redirects and --tee number them
LOGS = {STDOUT: "stdout.log", STDERR: "stderr.log"}


@dataclass(frozen=True, slots=True)
class _Started:
    """One rank's process with what it writes; its stderr is the last of the streams."""

    worker: Worker
    streams: Sequence[Stream]
    folder: Path
    logged: bool


class Ranks:
    """All ranks that ``start`` has started on this node; ``out`` and ``err`` show what they write.

    ``folder`` gets a subfolder for each local rank, with its error file and its logs; the folder that it is in is
    removed if the agent cannot do so itself, unless logs were asked for. ``environ`` says whether the user wants
    colours.
    """

    def __init__(
        self,
        options: LaunchOptions,
        seat: Seat,
        *,
        folder: Path,
        out: Console,
        err: Console,
        environ: Mapping[str, str],
    ) -> None:
        self._options = options
        self._seat = seat
        self._folder = folder
        self._consoles = (out, err)
        self._environ = environ
        self._started: list[_Started] = []
        self._stopped_at = math.inf
        self._reaper = Reaper(seat, folder=None if options.keeps_logs else folder.parent)

    def start(self, spec: WorkerSpec) -> None:
        """Start one rank. Raises LaunchError."""
        folder = self._folder / str(spec.local_rank)
        env = {**spec.env, "TORCHELASTIC_ERROR_FILE": str(folder / ERROR_FILE)}
        shown, logged = self._routes(spec.local_rank)
        own_stdout = self._is_plain(spec.rank) and bool(shown & STDOUT) and not logged & STDOUT
        try:
            folder.mkdir(parents=True)
            worker = Worker(spec, self._options.command, env=env, own_stdout=own_stdout)
        except OSError as error:
            raise LaunchError(f"rank {spec.rank} cannot be started", got=str(error)) from None
        self._reaper.watch(worker.pid)
        streams = []
        for bit, pipe, console in zip((STDOUT, STDERR), worker.pipes, self._consoles, strict=True):
            if pipe is not None:
                prefix = self._prefix(spec.rank, console=console)
                log = folder / LOGS[bit] if logged & bit else None
                visible = console if shown & bit else None
                streams.append(
                    Stream(pipe, console=visible, prefix=prefix, log=log, errors=self._consoles[1])
                )
        self._started.append(_Started(worker, streams, folder, bool(logged)))

    def _routes(self, local_rank: int) -> tuple[int, int]:
        """Which streams of a rank go to the console, and which to files, as bits."""
        opts = self._options
        redirected, teed = (which[local_rank] if which else 0 for which in (opts.redirects, opts.tee))
        hidden = opts.shown_ranks and local_rank not in opts.shown_ranks
        return 0 if hidden else (STDOUT | STDERR) & ~(redirected & ~teed), redirected | teed

    def _is_plain(self, rank: int) -> bool:
        return self._options.plain_rank == rank or self._seat.world_size == 1

    def _prefix(self, rank: int, *, console: Console) -> bytes | None:
        """What stands in front of the rank's lines; None if its bytes pass as they come."""
        if self._is_plain(rank):
            return None
        if not self._options.prefix:
            return b""
        colour = wants_colour(console.fd, environ=self._environ)
        return label(rank, world_size=self._seat.world_size, node=self._options.node_name, colour=colour)

    @property
    def workers(self) -> list[Worker]:
        """The ranks' processes, ended ones included."""
        return [each.worker for each in self._started]

    @property
    def running(self) -> int:
        """How many ranks have not ended."""
        return sum(worker.exit_code is None for worker in self.workers)

    def open_streams(self) -> Iterator[Stream]:
        """Streams to read from now: those not at their end, and whose reader keeps up."""
        streams = (stream for each in self._started for stream in each.streams)
        return (stream for stream in streams if not stream.closed and not stream.blocked)

    def signal(self, signum: int) -> None:
        """Send ``signum`` to the ranks alone."""
        for worker in self.workers:
            worker.signal(signum)

    def stop(self, signum: int) -> None:
        """Send ``signum`` to the ranks and to everything they have started, to end them."""
        self._stopped_at = min(self._stopped_at, time.time())
        for pid in self.survivors():
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def survivors(self) -> list[int]:
        """Processes in the ranks' sessions that still live."""
        return survivors({worker.pid for worker in self.workers})

    def ended(self) -> tuple[WorkerExit, ...]:
        """How those ended that have, as far as is known."""
        return tuple(self._exit(each) for each in self._started if each.worker.exit_code is not None)

    def finish(self) -> tuple[WorkerExit, ...]:
        """Pass on the last output of all ranks; how each ended (one that SIGKILL did not end counts as killed)."""
        now = time.time()
        for each in self._started:
            for stream in each.streams:
                stream.finish(now=now)
        return tuple(self._exit(each) for each in self._started)

    def close(self) -> None:
        """Let the processes and pipes go; what still runs is killed."""
        self._reaper.close()
        for worker in self.workers:
            worker.close()

    def _exit(self, started: _Started) -> WorkerExit:
        worker = started.worker
        code = -signal.SIGKILL if worker.exit_code is None else worker.exit_code
        error, at = _error(started.folder / ERROR_FILE, started.streams[-1]) if code else ("", 0.0)
        return WorkerExit(
            rank=worker.spec.rank,
            local_rank=worker.spec.local_rank,
            node=self._seat.nodes[self._seat.node_rank],
            pid=worker.pid,
            code=code,
            at=min(at or worker.exited_at, worker.exited_at),
            error=error,
            log=str(started.folder) if started.logged else "",
            stopped=worker.exit_code is None or worker.exited_at > self._stopped_at,
        )


def _error(recorded: Path, stderr: Stream) -> tuple[str, float]:
    """The rank's error, and when it happened (0: unknown), from the file that ``@record`` writes or from stderr."""
    if recorded.is_file():
        error = recorded_error(recorded.read_text(errors="replace"))
        if error:
            return error, recorded.stat().st_mtime  # finer than the whole seconds inside
    error = error_in(stderr.tail.text)
    return error, stderr.tail.traceback_at if HEADER in error else 0.0
