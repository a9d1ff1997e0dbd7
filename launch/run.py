"""Run a job: on this node, on emulated ones, or on this node as one of many.

Order matters here: everything that can be wrong is checked first; then the port is bound and the nodes meet; then
the store and the ranks start together; at the end one node tells the story.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from socket import socket

from distrain.core.errors import ConfigError, Problem, raise_if
from distrain.core.vocabulary import REPORT

from .agent import Agent
from .emulate import run_emulated
from .environ import for_ranks
from .failure import NodeReport, first_failure, signal_name, summary
from .job import plan_workers
from .options import LaunchOptions, check
from .output import Console
from .ranks import Ranks
from .rendezvous import meet
from .sidecar import keeper_at, with_keeper
from .signals import Signals
from .store import start_store
from .team import Host, Team, team


def run_job(
    command: Sequence[str],
    *,
    ranks: int,
    emulate_nodes: int = 1,
    env: Mapping[str, str] | None = None,
    plan: Path | None = None,
    plain_rank: int | None = None,
    prefix: bool = True,
    holds_keeper: bool = True,
) -> int:
    """Run ``command`` on ``ranks`` ranks of this machine; the job's exit code: 0, 1, or 128 + the signal that ended it.

    ``env`` is added to the environment of every rank. ``plain_rank`` is the rank whose output passes unprefixed; its
    stdout is this process's own, so it may draw on a terminal. Without ``holds_keeper`` the ranks of a single node
    start a keeper by themselves, in which the next launch of the same run finds what was in memory even if this one is
    killed. Raises ConfigError before anything starts.
    """
    if emulate_nodes > 0 and ranks % emulate_nodes:
        got = f"{ranks} ranks, {emulate_nodes} nodes"
        raise_if([Problem("the emulated nodes do not divide the ranks", got=got)])
    options = LaunchOptions(
        command=tuple(command),
        nproc=ranks // max(emulate_nodes, 1),
        emulate_nodes=emulate_nodes,
        plan=str(plan.resolve()) if plan else "",
        plain_rank=plain_rank,
        prefix=prefix,
        holds_keeper=holds_keeper,
    )
    return run(options, environ={**os.environ, **(env or {})})


def run(options: LaunchOptions, *, environ: Mapping[str, str] = os.environ) -> int:
    """Run what ``options`` ask for; its exit code. Raises ConfigError before anything starts, LaunchError later."""
    raise_if(check(options))
    sys.stdout.flush()
    if options.emulate_nodes > 1:
        return run_emulated(options, environ=_for_ranks(options, environ))
    return run_node(options, environ=environ)


def run_node(
    options: LaunchOptions, *, environ: Mapping[str, str] = os.environ, listener: socket | None = None
) -> int:
    """This node's part; ``listener`` is node 0's socket, if somebody has bound it already."""
    with ExitStack() as stack:
        meeting = meet(options, listener=listener)
        seat = meeting.seat
        others = team(meeting.links, nodes=seat.nodes, node_rank=seat.node_rank)
        stack.callback(others.close)
        environ = _for_ranks(options, environ)
        holds_keeper = options.holds_keeper or len(seat.nodes) > 1
        if holds_keeper:
            environ = with_keeper(environ, seat)
        specs = plan_workers(options, seat, environ=environ)
        folder = stack.enter_context(_folder(options))
        out, err = Console(1), Console(2)
        stack.callback(
            out.flush
        )  # after the signals have their old meaning: a stopped reader must not hold us
        stack.callback(err.flush)
        arrived = stack.enter_context(Signals())
        if holds_keeper:
            stack.enter_context(
                keeper_at(
                    environ,
                    seat,
                    members=meeting.members,
                    arrived=arrived,
                    is_stranded=lambda: 0 in others.lost,
                )
            )
        store = stack.enter_context(_serving(meeting.store)) if meeting.store else None
        ranks = Ranks(options, seat, folder=folder, out=out, err=err, environ=environ)
        stack.callback(ranks.close)
        agent = Agent(
            ranks, team=others, consoles=(out, err), store=store, grace_s=options.shutdown_timeout_s
        )
        for spec in specs:
            ranks.start(spec)
        agent.run(arrived)
        _tell(agent, others, options=options, environ=environ)
    return others.code


def _for_ranks(options: LaunchOptions, environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment of the ranks; what it decides for the user is said."""
    found = for_ranks(environ, nproc=options.nproc)
    if "OMP_NUM_THREADS" in found and "OMP_NUM_THREADS" not in environ:
        say("OMP_NUM_THREADS is not set: every rank computes with 1 thread")
    return found


def say(text: str) -> None:
    """A line of the launcher's own, before the agent's loop takes over."""
    print(f"[launch] {text}", file=sys.stderr, flush=True)


def _tell(agent: Agent, others: Team, *, options: LaunchOptions, environ: Mapping[str, str]) -> None:
    """Say how a job ended that did not end well: node 0 for all, another node only what node 0 cannot."""
    reports = [others.reports[node_rank] for node_rank in sorted(others.reports)]
    knows_all = isinstance(others, Host) or len(others.nodes) == 1 or bool(others.trouble)
    if knows_all and (path := environ.get(REPORT)):
        _report(Path(path), reports, code=others.code, lost=others.lost)
    if others.code > 128 and knows_all:
        agent.say(f"stopped by {signal_name(others.code - 128)}")
    elif others.code and knows_all:
        exits = [each for report in reports for each in report.exits]
        trouble = others.trouble or next((report.trouble for report in reports if report.trouble), "")
        agent.tell(summary(exits, trouble=trouble))
    elif others.code and not options.node_name:
        agent.say(f"the job failed: {others.why}; {others.nodes[0]} tells more")


def _report(path: Path, reports: Sequence[NodeReport], *, code: int, lost: Mapping[int, float]) -> None:
    """The same as JSON, for whoever started the launcher and asked for it; a disk that refuses is no reason to fail."""
    first = first_failure(each for report in reports for each in report.exits)
    told = {
        "code": code,
        "first_failure": asdict(first) if first else None,
        "lost": [{"node": node, "at": at} for node, at in lost.items()],
        "nodes": [report.to_json() for report in reports],
    }
    try:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(told, indent=1))
        temporary.replace(path)
    except OSError as error:
        say(f"the report cannot be written: {error}")


@contextmanager
def _serving(listener: socket) -> Iterator[subprocess.Popen[bytes]]:
    """The store's process, for as long as the job lasts."""
    with listener:
        process = start_store(listener)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _folder(options: LaunchOptions) -> Iterator[Path]:
    """Where the ranks' error files and logs go; removed at the end unless logs were asked for."""
    prefix = options.run_id.replace(os.sep, "_") + "_"
    try:
        if options.log_dir:
            Path(options.log_dir).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=options.log_dir or None))
    except OSError as error:
        raise ConfigError("--log-dir cannot be used", got=f"{options.log_dir}: {error.strerror}") from None
    if options.keeps_logs:
        say(f"logs: {folder}")
    try:
        yield folder / "attempt_0"
    finally:
        if not options.keeps_logs:
            shutil.rmtree(folder, ignore_errors=True)
