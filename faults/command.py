"""Starts a job as a process of its own, waits for it, and leaves nothing of it behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

GRACE_S = 15.0
TIMED_OUT = 128 + signal.SIGKILL
"""exit code of a job that took too long"""


def launch_words(*, ranks: int, nodes: int, netns: bool) -> list[str]:
    """Words that start what follows them on ``ranks`` ranks of this machine."""
    emulated = ["--emulate-nodes", str(nodes)] if nodes > 1 else []
    isolated = ["--netns"] if netns else []
    nproc = ["--nproc-per-node", str(ranks // nodes)]
    return [sys.executable, "-m", "distrain", "launch", *nproc, *emulated, *isolated]


def script_words(script: Path, args: Sequence[str], *, ranks: int, nodes: int, netns: bool) -> list[str]:
    """Words that run a script, unchanged, on ``ranks`` ranks of this machine, as armed as its environment says."""
    words = launch_words(ranks=ranks, nodes=nodes, netns=netns)
    return [*words, "-m", "distrain.faults.inject.script", str(script.absolute()), *args]


def run_command(
    words: Sequence[str], *, environ: Mapping[str, str], log: Path, timeout_s: float, cwd: Path | None = None
) -> int:
    """The exit code; output goes to ``log``. Whatever happens here, also Ctrl-C, ends the job first."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(words),
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            _end(process)


def first_failure(report: Path) -> dict[str, Any] | None:
    """Which rank the launcher says has failed first: its ``rank``, ``at`` (seconds since 1970), ``error`` and so on."""
    if not report.exists():
        return None
    found: dict[str, Any] | None = json.loads(report.read_text())["first_failure"]
    return found


def lost_nodes(report: Path) -> list[dict[str, Any]]:
    """Which nodes the launcher says are gone or silent: ``node`` and ``at`` (seconds since 1970)."""
    if not report.exists():
        return []
    found: list[dict[str, Any]] = json.loads(report.read_text())["lost"]
    return found


def end_all(pids: Sequence[int]) -> None:
    """Ask processes to end that have outlived their job."""
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGTERM)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Politely first: the launcher takes its ranks along."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
