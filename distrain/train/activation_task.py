"""The problem that ``activations.mode = "auto"`` gives to the program, for one pipeline rank of a run.

Bytes come from the formulas of ``planners.activations``, times from the FLOPs of a layer, and for memory there is what
the rest of the rank's states leaves of its device. All of it is the same on all ranks of a stage.
"""

from distrain.core.config import RunConfig
from distrain.core.vocabulary import GIB, ClusterSpec
from distrain.planners import schedules
from distrain.planners.activation_policy import ActivationTask, TensorGroup
from distrain.planners.activation_policy.problem import stage_passes
from distrain.planners.activations import GROUPS, Precision, token_bytes
from distrain.planners.layer_flops import layer_flops
from distrain.planners.memory import estimate
from distrain.planners.parallel_plan import ParallelPlan

from .sequences.settings import SequenceSettings

ACHIEVED = 0.5
"""of a device's peak, by a layer"""


def row_of(config: RunConfig, plan: ParallelPlan, sequences: SequenceSettings | None) -> tuple[int, int]:
    """Rows of a micro-batch on one rank, and the tokens of each that a layer is given."""
    data, degrees = config.data, plan.degrees
    if sequences is not None:
        tokens = sequences.packed_tokens(data, micro_batches=sequences.counted_micro_batches(plan))
        return 1, max(1, tokens // degrees.tp)
    return max(1, data.global_batch // (degrees.dp * plan.micro_batches)), max(1, data.seq_len // degrees.tp)


def host_bytes_of(config: RunConfig, plan: ParallelPlan, cluster: ClusterSpec) -> float:
    """This rank's share of its node's host memory for what is swapped."""
    ranks = min(cluster.devices_per_node, plan.world_size)
    if config.activations.host_gib:
        return config.activations.host_gib * GIB / ranks
    if cluster.device.name == "cpu":
        return 0.0
    return cluster.host_memory_bytes / 2 / ranks


def task_of(
    config: RunConfig,
    plan: ParallelPlan,
    cluster: ClusterSpec,
    *,
    sequences: SequenceSettings | None,
    layers: int,
    pp_rank: int,
    host_bytes: float,
    link_bytes_s: float,
) -> ActivationTask:
    """The program's problem for one pipeline rank with so many layers."""
    shape, degrees, data = config.model.shape(), plan.degrees, config.data
    rows, row_tokens = row_of(config, plan, sequences)
    precision = Precision.of(config.train.dtype)
    token = token_bytes(shape, tp=degrees.tp, precision=precision, fused_norms=cluster.device.name != "cpu")
    tokens = rows * row_tokens * degrees.tp
    micro_batches = sequences.counted_micro_batches(plan) if sequences else plan.micro_batches
    memory = estimate(
        shape,
        degrees,
        schedule=plan.schedule,
        data=plan.data,
        micro_batch_size=rows,
        seq_len=data.seq_len,
        micro_batches=micro_batches,
        dtype=config.train.dtype,
        optimizer=config.optimizer.name,
        cluster=cluster,
        packed_tokens=tokens if sequences else None,
    )
    rank = memory.ranks[pp_rank]
    of_layers = rank.activations_bytes - rank.output_bytes
    flops = layer_flops(shape, kind="llama", seq_len=data.seq_len)
    flop_s = tokens / (degrees.tp * cluster.device.peak_flops * ACHIEVED)  # of one FLOP a token
    again_s = {name: each * flop_s for name, each in flops.again.items()}
    num_passes = min(micro_batches, 2 * degrees.pp)
    schedule = schedules.build(
        plan.schedule,
        num_ranks=degrees.pp,
        micro_batches=num_passes - num_passes % degrees.pp or num_passes,
        stages_per_rank=degrees.vpp,
    )
    return ActivationTask(
        groups=tuple(
            TensorGroup(name, round(tokens * size), again_s.get(name))
            for name, size in zip(GROUPS, token.groups, strict=True)
        ),
        num_layers=layers,
        num_tokens=row_tokens,
        forward_s=flops.forward * flop_s,
        backward_s=flops.backward * flop_s,
        passes=stage_passes(schedule, rank=pp_rank),
        d2h_bytes_s=link_bytes_s,
        h2d_bytes_s=link_bytes_s,
        host_bytes=host_bytes,
        device_bytes=max(0.0, memory.device_limit_bytes - rank.total_bytes + of_layers),
    )
