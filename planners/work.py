"""How much a pipeline stage computes: FLOPs a token, counted over the matrices.

A matrix of n parameters takes 2n FLOPs a token for each of forward, input gradients and weight gradients.
The product of attention has no weights; with causal attention halved (PTD-P section 5.1) it takes 2 x heads
x head dim x span a token forward and twice that for its input gradients.
"""

from dataclasses import dataclass
from functools import lru_cache

from distrain.core.vocabulary import ModelShape, Schedule

from .schedules import placement
from .stages import stage_layers, stage_params


@dataclass(frozen=True, slots=True)
class StageWork:
    """The average stage of the rank with most work; FLOPs a token, before tp divides them."""

    layers: float
    forward_flops: float
    backward_input_flops: float
    backward_weight_flops: float
    boundaries: float
    """embedding and head of the rank, per stage: each has half the tensor-parallel traffic of a layer"""
    rank_params: int
    """of the rank with most parameters"""


@lru_cache(maxsize=4096)
def slowest_stage(shape: ModelShape, pp: int, vpp: int, schedule: Schedule, seq_len: int) -> StageWork:
    """The work of the rank that all others wait for, split evenly over its ``vpp`` stages."""
    ranges = stage_layers(shape.num_layers, pp * vpp)
    home = placement(schedule, num_ranks=pp, stages_per_rank=vpp)
    layers, params = [0] * pp, [0] * pp
    for rank, (first, last), count in zip(home, ranges, stage_params(shape, ranges), strict=True):
        layers[rank] += last - first
        params[rank] += count
    matrices = shape.layer_params - shape.d_model * (1 if shape.parallel_block else 2)
    head = shape.vocab_size * shape.d_model
    span = min(seq_len, shape.window) if shape.window else seq_len
    attention = shape.num_heads * shape.head_dim * span

    def work(rank: int) -> float:
        return layers[rank] * (matrices + attention) + head * (rank == home[-1])

    slowest = max(range(pp), key=work)
    products = layers[slowest] * matrices + head * (slowest == home[-1])
    return StageWork(
        layers=layers[slowest] / vpp,
        forward_flops=2 * (products + layers[slowest] * attention) / vpp,
        backward_input_flops=2 * (products + 2 * layers[slowest] * attention) / vpp,
        backward_weight_flops=2 * products / vpp,
        boundaries=((slowest == home[0]) + (slowest == home[-1])) / vpp,
        rank_params=max(params),
    )
