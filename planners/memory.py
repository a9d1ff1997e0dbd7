"""How much memory a layout takes: of each pipeline rank's device, and of a node's host.

Every number states what the trainer really keeps. With P parameters on the rank (matrices divided by tp,
norms not), w bytes each (4; 8 in float64), N replicas, and S ranks that shard one::

                      DDP    ZeRO-1         FSDP2 and HSDP
    parameters        P w    P w            P w / S
    gradients         P w    P w + P w / N  P w / S, and P w unsharded where micro-batches accumulate
    AdamW (LAMB: 3)   2 P w  2 P w / N      2 P w / S
    gathered units    -      -              embedding, head and two layers; in a pipeline P w
    autocast's casts  2 P    2 P            2 P

LAMB looks at all updates before it applies any. Autocast keeps its copies of the matrices to the end of the
step. In a pipeline FSDP2 keeps what it has gathered for the next micro-batch.

Activations are those of ``activations.py`` times the schedule's in-flight depth; a rank's stages all count
as its largest, which is exact but for a layer. Logits exist three times while the loss is taken, and once
for each micro-batch in flight. Buffers hold what is on its way: gathered FSDP units, a gradient before it
joins its bucket, messages between stages, and one layer's backward (a whole stage's where I and W are apart).

Where a group of ranks shares its sequences, each keeps its own tokens: before and after the all-to-all it is as
many numbers, of some heads of all tokens or of all heads of some.

The host holds processes and the token ids of this step and the next; corpora are memory-mapped. Where the
device is the CPU, the host holds all of it.
"""

from dataclasses import dataclass
from functools import lru_cache

from distrain.core.errors import Problem
from distrain.core.vocabulary import (
    GIB,
    Activations,
    ClusterSpec,
    DataParallel,
    Degrees,
    ModelShape,
    Schedule,
)

from .activation_plan import UNSWAPPED_LAYERS
from .activations import Precision, TokenBytes, token_bytes
from .closed_forms import depth, last_stage_depth
from .schedules import placement
from .stages import stage_layers

USABLE = 0.92
"""share of a device's memory that tensors can have: the rest is contexts, communicators and fragmentation"""

PROCESS_BYTES = {"cpu": GIB // 2, "cuda": 3 * GIB}
"""host memory of one rank's process: Python, torch and, with CUDA, its runtime and pinned staging"""

MESSAGES = 6
"""messages between stages that are on their way at once: four receives posted ahead, two sends"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Device memory of the ranks at one place in the pipeline, at the worst moment of a step."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    buffers_bytes: int
    output_bytes: int = 0
    """the part of ``activations_bytes`` that no layer keeps, but the head"""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        states = self.parameters_bytes + self.gradients_bytes + self.optimizer_bytes
        return states + self.activations_bytes + self.logits_bytes + self.buffers_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a layout needs and what the cluster has."""

    ranks: tuple[RankMemory, ...]
    """by pipeline rank; tensor- and data-parallel ranks of one place need the same"""
    device_limit_bytes: int
    """what tensors can have of one device"""
    host_bytes: int
    """of one node"""
    host_limit_bytes: int

    @property
    def worst_rank(self) -> int:
        """The pipeline rank that needs most."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].total_bytes)

    @property
    def peak_bytes(self) -> int:
        """Device memory of the worst rank."""
        return max(rank.total_bytes for rank in self.ranks)

    @property
    def shortfall_bytes(self) -> int:
        """What the device or the host lacks, whichever lacks more; 0 if the layout fits."""
        return max(0, self.peak_bytes - self.device_limit_bytes, self.host_bytes - self.host_limit_bytes)

    def problems(self) -> list[Problem]:
        """Why the layout does not fit; empty if it does."""
        problems = []
        if self.peak_bytes > self.device_limit_bytes:
            problems.append(
                Problem(
                    "the layout does not fit the device's memory",
                    got=f"pipeline rank {self.worst_rank} needs {gib(self.peak_bytes)}",
                    allowed=f"{gib(self.device_limit_bytes)} of each device",
                    hint="raise parallel.tp or parallel.pp, more micro-batches, or parallel.data = fsdp2",
                )
            )
        if self.host_bytes > self.host_limit_bytes:
            problems.append(
                Problem(
                    "the layout does not fit the host's memory",
                    got=f"each node needs {gib(self.host_bytes)}",
                    allowed=gib(self.host_limit_bytes),
                    hint="fewer ranks a node",
                )
            )
        return problems


def gib(num_bytes: float) -> str:
    """``num_bytes`` as people read it."""
    return f"{num_bytes / GIB:,.2f} GiB"


def estimate(
    shape: ModelShape,
    degrees: Degrees,
    *,
    schedule: Schedule,
    data: DataParallel,
    micro_batch_size: int,
    seq_len: int,
    micro_batches: int,
    dtype: str,
    optimizer: str,
    cluster: ClusterSpec,
    packed_tokens: int | None = None,
    activations: Activations = Activations.NONE,
) -> MemoryEstimate:
    """Memory of every pipeline rank and of a node, for a layout that ``core.layout.check_layout`` accepts.

    ``micro_batch_size`` is in sequences of ``seq_len`` tokens. Where groups of ranks share packed sequences,
    ``packed_tokens`` says instead how many tokens of a micro-batch one rank has. With ``activations = auto`` it is
    the least that a plan can do with.
    """
    on_cpu = cluster.device.name == "cpu"
    precision = Precision.of(dtype)
    tokens = micro_batch_size * seq_len if packed_tokens is None else packed_tokens
    token = token_bytes(shape, tp=degrees.tp, precision=precision, fused_norms=not on_cpu)
    shares = _shares(shape, degrees.tp, degrees.pp, degrees.vpp, schedule)
    depths = depth(schedule, num_ranks=degrees.pp, stages_per_rank=degrees.vpp, micro_batches=micro_batches)
    losses = last_stage_depth(schedule, num_ranks=degrees.pp, micro_batches=micro_batches)
    split_backward = schedule is Schedule.ZBV and degrees.pp > 1
    has_mask = packed_tokens is None and 0 < shape.window < seq_len
    mask = seq_len**2 * (1 + precision.compute_bytes) if has_mask else 0
    ranks = []
    for share, in_flight in zip(shares, depths, strict=True):
        output = tokens * token.output * losses * share.is_last
        at_work = tokens * token.layer * (share.layers if split_backward else 1)
        messages = MESSAGES * tokens * token.hidden * (degrees.pp > 1)
        ranks.append(
            RankMemory(
                **_states(
                    share, degrees, data, precision, optimizer=optimizer, accumulates=micro_batches > 1
                ),
                activations_bytes=round(
                    tokens * _kept(token, activations, layers=share.layers * in_flight) + output
                ),
                output_bytes=round(output),
                logits_bytes=round(tokens * token.logits * (losses + 2) * share.is_last),
                buffers_bytes=round(
                    _moving(share, degrees, data, precision.weight_bytes) + at_work + messages + mask
                ),
            )
        )
    num_ranks = min(cluster.devices_per_node, degrees.world_size)
    ids_bytes = 2 * 2 * 8 * micro_batches * tokens  # inputs and targets, this step and the next, int64
    host = num_ranks * (PROCESS_BYTES["cpu" if on_cpu else "cuda"] + ids_bytes)
    if on_cpu:
        host += num_ranks * max(rank.total_bytes for rank in ranks)
    return MemoryEstimate(
        ranks=tuple(ranks),
        device_limit_bytes=int(USABLE * cluster.device.memory_bytes),
        host_bytes=host,
        host_limit_bytes=cluster.host_memory_bytes,
    )


def _kept(token: TokenBytes, activations: Activations, *, layers: float) -> float:
    """Bytes a token that ``layers`` of all micro-batches in flight leave on the device.

    Recomputed layers leave their inputs, and the one at work is whole again; swapped ones pass through two rounding
    buffers, beside the last two, which stay.
    """
    recompute = min(layers * token.layer, layers * token.hidden + token.layer)
    swap = min(layers, 2 * UNSWAPPED_LAYERS) * token.layer
    match activations:
        case Activations.NONE:
            return layers * token.layer
        case Activations.RECOMPUTE:
            return recompute
        case Activations.SWAP | Activations.MEMO:
            return swap
        case Activations.AUTO:
            return min(recompute, swap)


@dataclass(frozen=True, slots=True)
class _Share:
    """What one rank holds of the model, in parameters after tp has divided them."""

    params: int
    cast: int
    """those that autocast copies: matrices without the embedding"""
    layer: int
    """of one layer"""
    root: int
    """of the largest stage's embedding, final norm and head, which are one FSDP unit"""
    largest: int
    """of the largest single parameter"""
    layers: int
    """layers of the largest stage"""
    is_last: bool


@lru_cache(maxsize=4096)
def _shares(shape: ModelShape, tp: int, pp: int, vpp: int, schedule: Schedule) -> tuple[_Share, ...]:
    """The share of every pipeline rank."""
    d, num_stages = shape.d_model, pp * vpp
    norms = d if shape.parallel_block else 2 * d
    matrices = (shape.layer_params - norms) // tp
    table = shape.vocab_size * d // tp
    ranges = stage_layers(shape.num_layers, num_stages)
    home = placement(schedule, num_ranks=pp, stages_per_rank=vpp)
    shares = []
    for rank in range(pp):
        stages = [stage for stage in range(num_stages) if home[stage] == rank]
        sizes = [ranges[stage][1] - ranges[stage][0] for stage in stages]
        embeds, projects = 0 in stages, num_stages - 1 in stages
        head = (table + d) * projects
        roots = [table * (stage == 0) + (table + d) * (stage == num_stages - 1) for stage in stages]
        shares.append(
            _Share(
                params=sum(sizes) * (matrices + norms) + table * embeds + head,
                cast=sum(sizes) * matrices + table * projects,
                layer=matrices + norms,
                root=max(roots),
                largest=max(d * max(shape.d_ffn, d) // tp, table * (embeds or projects)),
                layers=max(sizes),
                is_last=projects,
            )
        )
    return tuple(shares)


def _states(
    share: _Share,
    degrees: Degrees,
    data: DataParallel,
    precision: Precision,
    *,
    optimizer: str,
    accumulates: bool,
) -> dict[str, int]:
    """Parameters, gradients and optimizer states by the table above."""
    full = share.params * precision.weight_bytes
    casts = share.cast * precision.compute_bytes if precision.autocast else 0
    moments = 3 if optimizer == "lamb" else 2
    if data in (DataParallel.FSDP2, DataParallel.HSDP):
        sharded = -(-full // degrees.dp_shard)
        parameters, gradients, owned = sharded, sharded + full * accumulates, sharded
    elif data is DataParallel.ZERO1 and degrees.dp > 1:
        owned = -(-full // degrees.dp)
        parameters, gradients = full, full + owned
    else:
        parameters = gradients = owned = full
    return {
        "parameters_bytes": parameters + casts,
        "gradients_bytes": gradients,
        "optimizer_bytes": moments * owned,
    }


def _moving(share: _Share, degrees: Degrees, data: DataParallel, weight_bytes: int) -> int:
    """Bytes of parameters and gradients on their way between ranks or into a bucket."""
    if data not in (DataParallel.FSDP2, DataParallel.HSDP):
        return share.largest * weight_bytes
    gathered = share.params if degrees.pp > 1 else min(share.params, share.root + 2 * share.layer)
    return (gathered + max(share.root, share.layer)) * weight_bytes
