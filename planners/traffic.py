"""Data-parallel traffic: how fast rings are, and what of their work computing does not hide."""

from math import ceil, log2

from distrain.core.vocabulary import ClusterSpec, DataParallel, Degrees

BUCKET_BYTES = 25 * 1024**2
"""gradients that DDP and ZeRO-1 reduce at once"""


def bandwidth(cluster: ClusterSpec, *, size: int, stride: int) -> float:
    """Bytes a second of each rank in a ring of ``size`` ranks, ``stride`` apart.

    Link rates are those of one device in one direction. A ring that leaves its node does so through the
    links of all its members there.
    """
    if size * stride <= cluster.devices_per_node:
        return cluster.intra_node_gb_s * 1e9
    members = max(1, cluster.devices_per_node // stride)
    return min(cluster.intra_node_gb_s, cluster.inter_node_gb_s * members) * 1e9


def unhidden_s(
    num_bytes: float,
    degrees: Degrees,
    data: DataParallel,
    *,
    micro_batches: int,
    in_forward_s: float,
    in_backward_s: float,
    num_units: int,
    latency_s: float,
    cluster: ClusterSpec,
) -> float:
    """Data-parallel traffic of one step that nothing hides, on a rank with ``num_bytes`` of parameters.

    ``in_forward_s`` and ``in_backward_s`` are how much of it one micro-batch's forward and backward can hide.
    DDP and ZeRO-1 reduce during the last backward; ZeRO-1 gathers between two steps, where nothing computes.
    FSDP2 gathers for each forward and backward, or once a step in a pipeline, and reduces during the last
    backward. Each of its ``num_units`` is a collective of its own, as is each bucket of the other two.
    """
    sharded = data in (DataParallel.FSDP2, DataParallel.HSDP)
    num_collectives = num_units if sharded else ceil(num_bytes / BUCKET_BYTES)

    def pass_around(size: int, stride: int, volume: float) -> float:
        """One reduce-scatter or all-gather of ``volume`` bytes."""
        if size == 1:
            return 0.0
        moved = volume * (size - 1) / size
        return num_collectives * latency_s * ceil(log2(size)) + moved / bandwidth(
            cluster, size=size, stride=stride
        )

    def beyond(traffic_s: float, hidden_s: float) -> float:
        return max(0.0, traffic_s - hidden_s)

    if not sharded:
        half = pass_around(degrees.dp, degrees.tp, num_bytes)
        if data is DataParallel.DDP:
            return beyond(2 * half, in_backward_s)
        return beyond(half, in_backward_s) + half
    shard, replicas = degrees.dp_shard, degrees.dp // degrees.dp_shard
    gather = pass_around(shard, degrees.tp, num_bytes)
    reduce = gather + 2 * pass_around(replicas, degrees.tp * shard, num_bytes / shard)
    if degrees.pp > 1:
        return beyond(gather, in_forward_s) + beyond(reduce, in_backward_s)
    each = beyond(gather, in_forward_s) + beyond(gather, in_backward_s)
    last = beyond(gather, in_forward_s) + beyond(gather + reduce, in_backward_s)
    return (micro_batches - 1) * each + last
