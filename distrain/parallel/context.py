"""From degrees to a device mesh and its process groups.

Ranks count tensor-parallel fastest, so that the most talkative axis stays inside a node, then data-parallel, then
pipeline (PTD-P section 3)::

    rank = (pp_index * dp + dp_index) * tp + tp_index,   dp_index = dp_replicate_index * dp_shard + dp_shard_index
"""

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distrain.core.device import Device, open_device
from distrain.core.errors import ConfigError
from distrain.core.vocabulary import Degrees
from distrain.planners.parallel_plan import ParallelPlan

from .groups import GroupRegistry

AXES = ("pp", "dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True, slots=True)
class Parallel:
    """Where this rank stands, and the groups it shares with others."""

    degrees: Degrees
    mesh: DeviceMesh
    """axes pp, dp_replicate, dp_shard, tp"""
    groups: GroupRegistry
    device: Device
    rank: int
    coordinates: Mapping[str, int]
    """index on each axis, "dp" included"""


def init(
    plan: ParallelPlan | Degrees | None = None,
    *,
    device: str = "auto",
    timeout: timedelta = timedelta(minutes=5),
) -> Parallel:
    """Join the job and build its mesh, in any script started by `distrain launch` or torchrun.

    Without ``plan`` the file named by ``DISTRAIN_PLAN`` counts, and without that all ranks are data-parallel. The
    default process group is made if there is none, from torchrun's environment variables. ConfigError if the plan
    does not fit the world size.
    """
    opened = open_device(device, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        # Not bound to a device: torch would split new groups off the whole world's, which takes all of its ranks.
        dist.init_process_group(opened.backend, timeout=timeout)
    degrees = _degrees(plan, dist.get_world_size())
    shape = (degrees.pp, degrees.dp // degrees.dp_shard, degrees.dp_shard, degrees.tp)
    mesh = init_device_mesh(opened.torch_device.type, shape, mesh_dim_names=AXES)
    groups = {axis: mesh.get_group(axis) for axis in AXES}
    groups |= {
        "dp": _block(mesh, ("dp_replicate", "dp_shard")),
        "model": _block(mesh, ("dp_replicate", "dp_shard", "tp")),
    }
    for group in groups.values():
        with suppress(RuntimeError):  # a backend that waits for nobody has none
            group.set_timeout(timeout)  # a mesh gives its groups torch's default, half an hour on gloo
    coordinates = {axis: mesh.get_local_rank(axis) for axis in AXES}
    coordinates["dp"] = coordinates["dp_replicate"] * degrees.dp_shard + coordinates["dp_shard"]
    # All ranks have made as many groups with torch's own calls, and more in each ``init``: so many are its name.
    name = str(dist.distributed_c10d._world.group_count)
    registry = GroupRegistry(groups, timeout=timeout, name=name)
    return Parallel(degrees, mesh, registry, opened, dist.get_rank(), coordinates)


def _degrees(plan: ParallelPlan | Degrees | None, world_size: int) -> Degrees:
    if plan is None and (path := os.environ.get("DISTRAIN_PLAN")):
        plan = ParallelPlan.load(Path(path))
    if plan is None:
        return Degrees(dp=world_size)
    degrees = plan.degrees if isinstance(plan, ParallelPlan) else plan
    if degrees.world_size != world_size:
        raise ConfigError(
            "the plan is for another number of ranks",
            got=f"tp {degrees.tp} x pp {degrees.pp} x dp {degrees.dp} = {degrees.world_size}, world size {world_size}",
            allowed=f"a plan for {world_size} ranks",
            hint=f"distrain launch --nproc-per-node {degrees.world_size} ..., or plan anew",
        )
    return degrees


def _block(mesh: DeviceMesh, axes: tuple[str, ...]) -> dist.ProcessGroup:
    """The group of the ranks that differ from this one only on ``axes``; all ranks make all such groups."""
    kept = [AXES.index(axis) for axis in axes]
    rest = [i for i in range(len(AXES)) if i not in kept]
    size = math.prod(mesh.size(i) for i in kept)
    group, _ = dist.new_subgroups_by_enumeration(mesh.mesh.permute(*rest, *kept).reshape(-1, size).tolist())
    assert isinstance(group, dist.ProcessGroup)
    return group
