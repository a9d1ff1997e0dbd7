"""What a launch was asked to do: a frozen record, from the command line or from Python, checked as a whole.

Every field is plain JSON, so that the agents of emulated nodes get the same record on their command line.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distrain.core.errors import ConfigError, Problem

from .placement import read_plan

LOOPBACK = "127.0.0.1"
MAX_EMULATED = 256
"""nodes of one machine, each of which is a process of its own before its first rank"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOptions:
    """A launch, as one node sees it."""

    command: tuple[str, ...]
    """program and arguments of every rank"""
    nproc: int = 1
    """ranks on this node, or on each emulated one"""
    nnodes: int = 1
    node_rank: int | None = 0
    """None: in order of arrival"""
    node_name: str = ""
    """name of this node in messages; empty: the host's"""
    emulate_nodes: int = 1
    netns: bool = False
    """each emulated node has a network of its own"""
    master_addr: str = LOOPBACK
    """where the nodes meet, and where node 0 serves the store"""
    master_port: int = 0
    """0: any free port (one node only)"""
    shared_port: bool = True
    """the store is served on the port where the nodes meet (static), not on one of its own (c10d)"""
    is_host: bool | None = None
    """whether this node hosts the meeting; None: if it can listen there"""
    join_timeout_s: float = 600.0
    local_addr: str = ""
    run_id: str = "none"
    role: str = "default"
    plan: str = ""
    """path of a ParallelPlan; empty: ranks in order"""
    virtual_local_rank: bool = False
    log_dir: str = ""
    redirects: tuple[int, ...] = ()
    """by local rank: 1 stdout, 2 stderr, 3 both go to a file only; missing: 0"""
    tee: tuple[int, ...] = ()
    """by local rank: the same, to a file and to the console"""
    shown_ranks: tuple[int, ...] = ()
    """local ranks whose output reaches the console; empty: all"""
    plain_rank: int | None = None
    """the rank whose output passes through as it is"""
    holds_keeper: bool = True
    """the keeper lives and ends with this launch; otherwise ranks of a single node start one that outlives it"""
    prefix: bool = True
    shutdown_timeout_s: float | None = None
    """seconds between the first signal and SIGKILL; None: the default of the case"""

    @property
    def keeps_logs(self) -> bool:
        """Whether the ranks' files are to be there afterwards."""
        return bool(self.log_dir or any(self.redirects) or any(self.tee))

    def to_json(self) -> str:
        """This record as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "LaunchOptions":
        """The record that ``to_json`` wrote."""
        pairs = json.loads(text).items()
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in pairs
        }
        return cls(**fields)


def check(options: LaunchOptions) -> list[Problem]:
    """What cannot work about ``options`` on this machine, whoever made them."""
    problems = []
    if options.nproc < 1:
        problems.append(
            Problem("--nproc-per-node must be positive", got=str(options.nproc), allowed="1 or more")
        )
    if options.nnodes < 1:
        problems.append(Problem("--nnodes must be positive", got=str(options.nnodes), allowed="1 or more"))
    elif options.node_rank is not None and not 0 <= options.node_rank < options.nnodes:
        problems.append(
            Problem(
                "--node-rank is out of range",
                got=str(options.node_rank),
                allowed=f"0 to {options.nnodes - 1}",
            )
        )
    if options.emulate_nodes < 1:
        problems.append(
            Problem("--emulate-nodes must be positive", got=str(options.emulate_nodes), allowed="1 or more")
        )
    elif options.emulate_nodes > MAX_EMULATED:
        got, allowed = str(options.emulate_nodes), f"1 to {MAX_EMULATED}"
        problems.append(Problem("--emulate-nodes asks too much of one machine", got, allowed))
    if options.netns and options.emulate_nodes == 1:
        problems.append(Problem("--netns is for emulated nodes", "1 node", hint="--emulate-nodes 2"))
    if options.netns and (options.local_addr or options.master_addr != LOOPBACK):
        got = " ".join(filter(None, (options.master_addr, options.local_addr)))
        problems.append(Problem("--netns gives the nodes their addresses itself", got, "no address"))
    world_size = options.nproc * options.nnodes * options.emulate_nodes
    if options.plain_rank is not None and not 0 <= options.plain_rank < max(world_size, 1):
        problems.append(
            Problem(
                "--plain-rank is out of range", got=str(options.plain_rank), allowed=f"0 to {world_size - 1}"
            )
        )
    if options.log_dir and Path(options.log_dir).exists() and not Path(options.log_dir).is_dir():
        problems.append(Problem("--log-dir is not a folder", got=options.log_dir))
    if options.plan and not problems:
        try:
            read_plan(options.plan, nprocs=(options.nproc,) * (options.nnodes * options.emulate_nodes))
        except ConfigError as error:
            problems += error.problems
    return problems
