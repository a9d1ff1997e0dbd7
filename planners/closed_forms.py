"""What a pipeline schedule costs, without building it: bubble and in-flight depth in closed form.

A planner weighs thousands of layouts, many with more steps than could be simulated. Tests hold every formula
here against the simulation.
"""

from distrain.core.vocabulary import Schedule


def bubble(
    kind: Schedule,
    *,
    num_ranks: int,
    micro_batches: int,
    forward: float = 1.0,
    backward_input: float = 1.0,
    backward_weight: float = 1.0,
) -> float:
    """Time that a step takes beyond the work of one rank; costs are those of one *stage* and micro-batch.

    GPipe and 1F1B fill and drain the pipeline once, ``(p - 1)(F + B)``; interleaved does the same with
    stages of 1/v of the size (PTD-P section 2.2). ZBV hides the drain: with ``I >= F >= W`` (attention has
    no weights, so its share is 1 : 2 : 0) and ``m >= 2p - 1`` micro-batches there remain
    ``(p - 1) max(I, 2(I - W))``. With fewer, the way down and up and back is not filled: ``2(p - 1)(F + I)``
    for one micro-batch, less 2F for each of the next p - 1 and 2W for each of the p - 1 after these.
    """
    p, m = num_ranks, micro_batches
    if kind is not Schedule.ZBV:
        return (p - 1) * (forward + backward_input + backward_weight)
    filled = 2 * forward * (min(m, p) - 1) + 2 * backward_weight * min(max(m - p, 0), p - 1)
    return max((p - 1) * backward_input, 2 * (p - 1) * (forward + backward_input) - filled)


def depth(kind: Schedule, *, num_ranks: int, stages_per_rank: int = 1, micro_batches: int) -> tuple[int, ...]:
    """Most activations alive on each rank at once, each of one stage and one micro-batch
    (``timeline.in_flight``)."""
    p, v, m = num_ranks, stages_per_rank, micro_batches
    if p == 1 and v == 1:
        return (1,)
    if kind is Schedule.GPIPE:
        return (m,) * p
    if kind is Schedule.ONE_F_ONE_B:
        return tuple(min(p - rank, m) for rank in range(p))
    if kind is Schedule.INTERLEAVED:
        return tuple(min((v - 1) * p + 2 * (p - rank - 1) + 1, v * m) for rank in range(p))
    return tuple(min(2 * p, 2 * m, m + 1 + rank) for rank in range(p))


def last_stage_depth(kind: Schedule, *, num_ranks: int, micro_batches: int) -> int:
    """Most micro-batches whose logits are alive at once: only GPipe lets them pile up."""
    return micro_batches if kind is Schedule.GPIPE and num_ranks > 1 else 1
