"""Run a command as the ranks of a job on this machine."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from .store import LOOPBACK, listen, start_store
from .tether import tethered


def run_job(
    command: Sequence[str],
    *,
    ranks: int,
    emulate_nodes: int = 1,
    env: Mapping[str, str] | None = None,
    plan: Path | None = None,
    plain_rank: int | None = None,
) -> int:
    """Run ``command`` on ``ranks`` ranks of this machine and return the job's exit code (0, 1 or 130).

    ``plain_rank`` names the rank whose output passes unprefixed; its stdout is this process's own, so it may draw
    on a terminal.
    """
    per_node = ranks // emulate_nodes
    with listen() as listener:
        store = start_store(listener)
        workers: list[subprocess.Popen[bytes]] = []
        pumps: list[threading.Thread] = []
        for rank in range(ranks):
            plain = rank == plain_rank
            worker = subprocess.Popen(
                tethered(command),
                env={
                    **os.environ,
                    **(env or {}),
                    **({"DISTRAIN_PLAN": str(plan.resolve())} if plan else {}),
                    "RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_RANK": str(rank % per_node),
                    "LOCAL_WORLD_SIZE": str(per_node),
                    "GROUP_RANK": str(rank // per_node),
                    "GROUP_WORLD_SIZE": str(emulate_nodes),
                    "MASTER_ADDR": LOOPBACK,
                    "MASTER_PORT": str(listener.getsockname()[1]),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": "0",
                    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
                    "PYTHONUNBUFFERED": "1",
                },
                stdout=None if plain else subprocess.PIPE,
                stderr=None if plain else subprocess.PIPE,
                start_new_session=True,
            )
            workers.append(worker)
            for stream, target in ((worker.stdout, sys.stdout.buffer), (worker.stderr, sys.stderr.buffer)):
                if stream is not None:
                    pumps.append(threading.Thread(target=_pump, args=(stream, target, rank), daemon=True))
                    pumps[-1].start()
        try:
            failed = _wait(workers)
        except KeyboardInterrupt:
            failed = 130
        for worker in workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        for pump in pumps:
            pump.join(timeout=5)
        store.kill()
        store.wait()
    return failed


def _pump(source: IO[bytes], target: IO[bytes], rank: int) -> None:
    for line in source:
        target.write(b"[rank %d] " % rank + line)
        target.flush()


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [worker.poll() for worker in workers]
        if any(code for code in codes):
            return 1
        if all(code == 0 for code in codes):
            return 0
        threading.Event().wait(0.05)
