"""How long a step takes under a layout: the time model by which layouts are compared.

After PTD-P (2104.04473, sections 2 and 3), with the trainer's own schedules and reductions. One step of m
micro-batches on pipeline ranks of v stages each takes::

    m v (F + I + W)   work of the slowest rank: matrix products, the layers' other work, tensor-parallel
    traffic + bubble          closed_forms.bubble of these costs + reduction       data-parallel traffic that
    computing does not hide (traffic.py) + optimizer       memory traffic of the update

F, I and W are forward, input gradients and weight gradients of one stage (work.py). Tensor parallelism moves
``b s d (t - 1)/t`` numbers four times a layer in forward and four times in backward, and nothing hides it.
Each hop between stages is waited for, which is an upper bound (a test shows it).

Rates are those of a device's datasheet times what a ``Calibration`` says can be reached. The model is made to
rank layouts; its absolute seconds are no better than the calibration.
"""

from dataclasses import dataclass, fields

from distrain.core.vocabulary import ClusterSpec, DataParallel, Degrees, DeviceSpec, ModelShape, Schedule

from .activations import Precision
from .closed_forms import bubble
from .traffic import bandwidth, unhidden_s
from .work import StageWork, slowest_stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How far a device stays behind its datasheet.

    The defaults are for GPUs. With them the ten layouts of PTD-P's table 1 come out 13 % off on average and
    21 % at worst, on the same cluster of A100.
    """

    peak_fraction: float = 0.6
    """share of the peak that large matrix products reach"""
    half_width: float = 256.0
    """features of a local matrix at which half of that is left: why tensor parallelism has a price"""
    half_tokens: float = 128.0
    """tokens of a micro-batch at which half of it is left"""
    layer_s: float = 2e-4
    """a layer's forward and backward beyond its products: launches, norms, rotations"""
    tensor_s: float = 1e-4
    """what it takes to begin the eight collectives of a tensor-parallel layer"""
    unit_s: float = 2e-5
    """what FSDP2's hooks around one unit take in each micro-batch"""
    message_s: float = 2e-5
    """until a message between two ranks begins to arrive"""
    memory_bytes_s: float = 1.5e12
    """what the optimizer reads and writes in a second"""
    overlap: float = 0.8
    """share of computing time that can hide traffic of the data-parallel kind"""

    @classmethod
    def of(cls, device: DeviceSpec) -> "Calibration":
        """The calibration of a kind of device. On a CPU all waits for Python, and little overlaps."""
        if device.name != "cpu":
            return cls()
        return cls(
            peak_fraction=0.7,
            half_width=32.0,
            half_tokens=16.0,
            layer_s=1e-3,
            tensor_s=5e-3,
            unit_s=5e-3,
            message_s=5e-4,
            memory_bytes_s=2e10,
            overlap=0.3,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step, by what they are spent on."""

    compute_s: float
    tensor_s: float
    messages_s: float
    bubble_s: float
    reduction_s: float
    optimizer_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by what they are spent on."""
        return {field.name.removesuffix("_s"): float(getattr(self, field.name)) for field in fields(self)}


def step_time(
    shape: ModelShape,
    degrees: Degrees,
    *,
    schedule: Schedule,
    data: DataParallel,
    micro_batch_size: int,
    seq_len: int,
    micro_batches: int,
    dtype: str,
    cluster: ClusterSpec,
    calibration: Calibration,
) -> StepTime:
    """Time of one step under a layout that ``core.layout.check_layout`` accepts."""
    precision = Precision.of(dtype)
    stage = slowest_stage(shape, degrees.pp, degrees.vpp, schedule, seq_len)
    tokens = micro_batch_size * seq_len
    products = _products_s(shape, degrees, stage, tokens, cluster, calibration)
    forward, backward_input, backward_weight = products
    tensor = _tensor_s(shape, degrees, stage, tokens * precision.compute_bytes, cluster, calibration)
    message = _message_s(shape, degrees, tokens * precision.weight_bytes, cluster, calibration)
    passes = micro_batches * degrees.vpp
    rank_bytes = stage.rank_params * precision.weight_bytes / degrees.tp
    num_units = round(degrees.vpp * (stage.layers + 1))
    is_sharded = data in (DataParallel.FSDP2, DataParallel.HSDP)
    reduction = unhidden_s(
        rank_bytes,
        degrees,
        data,
        micro_batches=micro_batches,
        in_forward_s=calibration.overlap * degrees.vpp * (forward + tensor),
        in_backward_s=calibration.overlap * degrees.vpp * (backward_input + backward_weight + tensor),
        num_units=num_units,
        latency_s=calibration.message_s,
        cluster=cluster,
    )
    owned = rank_bytes / {DataParallel.ZERO1: degrees.dp, DataParallel.DDP: 1}.get(data, degrees.dp_shard)
    return StepTime(
        compute_s=passes * sum(products),
        tensor_s=passes * 2 * tensor,
        messages_s=passes * 2 * message,
        bubble_s=bubble(
            schedule,
            num_ranks=degrees.pp,
            micro_batches=micro_batches,
            forward=forward + tensor + message,
            backward_input=backward_input + tensor + message,
            backward_weight=backward_weight,
        ),
        reduction_s=reduction + is_sharded * micro_batches * num_units * calibration.unit_s,
        # The update reads parameter, gradient and both moments, and writes all but the gradient.
        optimizer_s=7 * owned / calibration.memory_bytes_s,
    )


def _products_s(
    shape: ModelShape,
    degrees: Degrees,
    stage: StageWork,
    tokens: int,
    cluster: ClusterSpec,
    calibration: Calibration,
) -> tuple[float, float, float]:
    """Forward, input gradients and weight gradients of a stage, without communication."""
    width = shape.d_model / degrees.tp
    efficiency = calibration.peak_fraction * width / (width + calibration.half_width)
    efficiency *= tokens / (tokens + calibration.half_tokens)
    seconds_a_flop = 1 / (degrees.tp * cluster.device.peak_flops * efficiency)
    other = stage.layers * calibration.layer_s / 3
    return (
        other + tokens * stage.forward_flops * seconds_a_flop,
        other + tokens * stage.backward_input_flops * seconds_a_flop,
        other + tokens * stage.backward_weight_flops * seconds_a_flop,
    )


def _tensor_s(
    shape: ModelShape,
    degrees: Degrees,
    stage: StageWork,
    token_bytes: float,
    cluster: ClusterSpec,
    calibration: Calibration,
) -> float:
    """Tensor-parallel traffic of one stage's forward (backward has as much)."""
    if degrees.tp == 1:
        return 0.0
    volume = token_bytes * shape.d_model * (degrees.tp - 1) / degrees.tp
    rate = bandwidth(cluster, size=degrees.tp, stride=1)
    return stage.layers * calibration.tensor_s / 2 + (4 * stage.layers + stage.boundaries) * volume / rate


def _message_s(
    shape: ModelShape, degrees: Degrees, token_bytes: float, cluster: ClusterSpec, calibration: Calibration
) -> float:
    """One hidden state from stage to stage."""
    if degrees.pp == 1:
        return 0.0
    rate = bandwidth(cluster, size=degrees.pp, stride=degrees.tp * degrees.dp)
    return calibration.message_s + token_bytes * shape.d_model / degrees.tp / rate
