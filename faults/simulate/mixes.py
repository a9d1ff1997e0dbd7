"""Published failure mixes, as failures in 1,000 node-days.

What is published, and what is assumed here:

llama3
    Llama 3 405B (arXiv 2407.21783, section 3.3.4, table 5): 54 days on 2,048 nodes of 8 GPUs, 47 planned and 419
    unexpected interruptions; the counts below are the paper's. Assumed: which classes take the node along (hardware
    does, software and collective timeouts do not), and that timeouts show as hangs.
c4
    C4 (arXiv 2406.04594): a job of 4,096 GPUs crashed about 40 times in a month; shares of the errors, and the part of
    each class that is confined to one node, which is the node to be replaced. Assumed: a month of 30 days, nodes of
    8 GPUs, and that timeouts show as hangs.
byterobust
    ByteRobust (arXiv 2509.16293, table 1): shares among 49,212 incidents of 778,135 jobs in three months. Manual
    changes of code and data are the planned ones; a fall of the throughput interrupts nobody and is left out. Its rate
    a node is not published; assumed are the 2.3 in 1,000 server-days of FT-HSDP (arXiv 2602.00277), and that hardware
    and network classes take the node along.
megascale
    MegaScale (arXiv 2402.15627): more than 100 recoveries on 12,288 GPUs in some weeks, over 90 % of them without
    people. Assumed: 100 in three weeks, nodes of 8 GPUs, and, since no shares are published, one class, in which the
    node is lost as often as in C4 (82.5 %).
"""

from collections.abc import Mapping
from types import MappingProxyType

from .failures import FailureClass, Shows


def _of_counts(counts: Mapping[str, float], *, node_days: float) -> Mapping[str, float]:
    return {name: 1000 * count / node_days for name, count in counts.items()}


def _classes(
    rates: Mapping[str, float],
    *,
    node_shares: Mapping[str, float],
    shows: Mapping[str, Shows],
) -> tuple[FailureClass, ...]:
    return tuple(
        FailureClass(
            name=name,
            per_1000_node_days=rate,
            node_share=node_shares.get(name, 0.0),
            shows=shows.get(name, Shows.CRASH),
        )
        for name, rate in rates.items()
    )


_LLAMA3_HARDWARE = {
    "faulty_gpu": 148,
    "gpu_hbm3": 72,
    "network_switch_or_cable": 35,
    "host_maintenance": 32,
    "gpu_sram": 19,
    "gpu_system_processor": 17,
    "nic": 7,
    "silent_corruption": 6,
    "gpu_thermal_or_sensor": 6,
    "ssd": 3,
    "power_supply": 3,
    "server_chassis": 2,
    "io_expansion_board": 2,
    "cpu": 2,
    "system_memory": 2,
}
_LLAMA3_SOFTWARE = {"software_bug": 54, "nccl_watchdog_timeout": 7, "dependency": 2, "planned": 47}

_C4_SHARES = {  # percent of the errors, and the part of them that is confined to one node
    "cuda_error": (12.5, 1.0),
    "ecc_or_nvlink_error": (27.5, 1.0),
    "nccl_timeout": (20.0, 0.75),
    "ack_timeout": (27.5, 0.818),
    "other_network": (12.5, 0.4),
}

_BYTEROBUST_SHARES = {
    "cuda_error": 36.1,
    "code_or_data_change": 17.3,
    "cpu_overload": 11.0,
    "cpu_out_of_memory": 10.1,
    "hang": 9.9,
    "disk_space": 6.8,
    "infiniband": 2.9,
    "file_system_mount": 2.1,
    "hdfs": 2.0,
    "container": 1.4,
    "kernel_panic": 1.3,
    "gpu_memory": 1.1,
    "external_service": 0.7,
    "gpu_lost": 0.5,
    "disk_fault": 0.4,
    "nan": 0.3,
}
_BYTEROBUST_NODES = ("cuda_error", "infiniband", "kernel_panic", "gpu_memory", "gpu_lost", "disk_fault")

MIXES: Mapping[str, tuple[FailureClass, ...]] = MappingProxyType(
    {
        "llama3": _classes(
            _of_counts(_LLAMA3_HARDWARE | _LLAMA3_SOFTWARE, node_days=54 * 2048),
            node_shares=dict.fromkeys(_LLAMA3_HARDWARE, 1.0),
            shows={
                "silent_corruption": Shows.CORRUPTION,
                "nccl_watchdog_timeout": Shows.HANG,
                "planned": Shows.PLANNED,
            },
        ),
        "c4": _classes(
            _of_counts({name: 0.4 * share for name, (share, _) in _C4_SHARES.items()}, node_days=30 * 512),
            node_shares={name: node_share for name, (_, node_share) in _C4_SHARES.items()},
            shows={"nccl_timeout": Shows.HANG, "ack_timeout": Shows.HANG},
        ),
        "byterobust": _classes(
            {
                name: 2.3 * share / sum(_BYTEROBUST_SHARES.values())
                for name, share in _BYTEROBUST_SHARES.items()
            },
            node_shares=dict.fromkeys(_BYTEROBUST_NODES, 1.0),
            shows={
                "hang": Shows.HANG,
                "nan": Shows.CORRUPTION,
                "code_or_data_change": Shows.PLANNED,
            },
        ),
        "megascale": _classes(
            _of_counts({"exception": 100}, node_days=21 * 1536),
            node_shares={"exception": 0.825},
            shows={},
        ),
    }
)
