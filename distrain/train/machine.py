"""The cluster that a run is planned for: this machine, or the one that ``[cluster]`` describes.

Asks the driver's own tool for GPUs, since the launching process has no torch. What is not known is assumed, and said.
"""

import subprocess
from dataclasses import dataclass

from distrain.core.config import RunConfig
from distrain.core.gpus import list_gpus
from distrain.core.host import host_memory_bytes
from distrain.core.vocabulary import DEVICES, GIB, ClusterSpec, DeviceSpec

ELSEWHERE = "h100-80g"
"""device of a dry run for another machine that does not say which"""
HOST_BYTES_PER_GPU = 256 * GIB
"""host memory a GPU of machines elsewhere"""


@dataclass(frozen=True, slots=True)
class Machine:
    """A cluster, and in words what of it was assumed rather than asked or told."""

    cluster: ClusterSpec
    assumed: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: RunConfig, *, world_size: int, here: bool) -> "Machine":
        """The machine for ``world_size`` ranks of ``config``; ``here`` is this node, otherwise ``[cluster]`` counts."""
        told = config.cluster
        gpus = [] if told.device or config.launch.device == "cpu" else local_gpus()
        host = int(told.host_memory_gib * GIB)
        if told.device:
            device = DEVICES[told.device]
        elif gpus:
            device = gpus[0]
        elif config.launch.device == "cpu" or (here and config.launch.device == "auto"):
            device = DEVICES["cpu"]
        else:
            device = DEVICES[ELSEWHERE]
        per_node = min(world_size, world_size if here else told.devices_per_node)
        assumed = []
        if not here and not told.device:
            assumed.append(f"device {device.name}: set cluster.device to plan for another")
        if not host and here:
            host = host_memory_bytes()
        elif not host:
            host = per_node * (device.memory_bytes if device.name == "cpu" else HOST_BYTES_PER_GPU)
            assumed.append(f"{host // GIB} GiB of host memory a node: set cluster.host_memory_gib")
        if device.name == "cpu" and not told.device and here:
            device = DeviceSpec(name="cpu", memory_bytes=host // per_node, peak_flops=device.peak_flops)
        cluster = ClusterSpec(
            num_nodes=-(-world_size // per_node),
            devices_per_node=per_node,
            device=device,
            host_memory_bytes=host,
        )
        return cls(cluster, tuple(assumed))


def local_gpus() -> list[DeviceSpec]:
    """This node's NVIDIA GPUs; empty without a driver that answers."""
    try:
        gpus = list_gpus()
    except (OSError, subprocess.TimeoutExpired):  # the doctor says what is wrong with it
        gpus = []
    if not gpus:
        return []
    from distrain.core.device import known_device  # loads torch, which the ranks will need anyway

    return [
        known_device(name, memory_bytes=memory_bytes)
        or DeviceSpec(name=name, memory_bytes=memory_bytes, peak_flops=100e12)
        for name, memory_bytes in gpus
    ]
