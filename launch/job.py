"""From a launch to the ranks of one node: who they are and what they find in their environment. Pure.

A ``Seat`` is what the nodes agree on when they meet; with it every node works out its own ranks. The variables are
torchrun's, name by name, so that scripts written for it see no difference.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distrain.core.errors import Problem, raise_if

from .options import LaunchOptions
from .placement import Placement, in_order, read_plan


@dataclass(frozen=True, slots=True)
class Seat:
    """One node's place in the job."""

    node_rank: int
    nodes: tuple[str, ...]
    """names by node rank"""
    nprocs: tuple[int, ...]
    """ranks by node rank"""
    master_addr: str
    master_port: int
    job: str = ""
    """unique name of this launch, for its keepers"""
    job_key: str = ""
    """the secret by which its processes know each other"""
    coordinator: str = ""
    """HOST:PORT of node 0's keeper; empty on one node"""

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return sum(self.nprocs)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One rank to start."""

    rank: int
    local_rank: int
    env: Mapping[str, str]
    """its whole environment"""


def plan_workers(options: LaunchOptions, seat: Seat, *, environ: Mapping[str, str]) -> tuple[WorkerSpec, ...]:
    """The ranks of the node in ``seat``, by local rank, which inherit ``environ``.

    Raises ConfigError if the plan or CUDA_VISIBLE_DEVICES does not fit the nodes that met.
    """
    placement = place(options, seat)
    shared = dict(environ) | _job_env(options, seat, environ=environ)
    specs = []
    for local_rank, rank in enumerate(placement[seat.node_rank]):
        own = {"RANK": str(rank), "ROLE_RANK": str(rank), "LOCAL_RANK": str(local_rank)}
        specs.append(WorkerSpec(rank, local_rank, shared | own))
    return tuple(_one_device_each(specs, environ=environ) if options.virtual_local_rank else specs)


def place(options: LaunchOptions, seat: Seat) -> Placement:
    """Global ranks by node."""
    return read_plan(options.plan, nprocs=seat.nprocs) if options.plan else in_order(seat.nprocs)


def _job_env(options: LaunchOptions, seat: Seat, *, environ: Mapping[str, str]) -> dict[str, str]:
    """What is the same for every rank of a node."""
    world_size = str(seat.world_size)
    nproc = seat.nprocs[seat.node_rank]
    env = {
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": str(seat.node_rank),
        "GROUP_WORLD_SIZE": str(len(seat.nprocs)),
        "ROLE_NAME": options.role,
        "ROLE_WORLD_SIZE": world_size,
        "MASTER_ADDR": seat.master_addr,
        "MASTER_PORT": str(seat.master_port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": options.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "DISTRAIN_NODE": seat.nodes[seat.node_rank],
    }
    if options.plan:
        env["DISTRAIN_PLAN"] = options.plan
    return env


def _one_device_each(specs: list[WorkerSpec], *, environ: Mapping[str, str]) -> list[WorkerSpec]:
    """Each rank sees one GPU, its own, as device 0 (--virtual-local-rank)."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible is not None else [str(spec.local_rank) for spec in specs]
    if len(devices) < len(specs):
        got = f"CUDA_VISIBLE_DEVICES={visible}, {len(specs)} ranks"
        raise_if([Problem("--virtual-local-rank needs one visible device a rank", got=got)])
    return [
        WorkerSpec(
            spec.rank,
            spec.local_rank,
            {**spec.env, "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": device.strip()},
        )
        for spec, device in zip(specs, devices, strict=False)
    ]
