"""Swapping over a slow link, simulated: the policy's program against a grid of alphas and the two simple answers.

Layers of a 7B GPT on 8 GPUs in tensor and sequence parallelism, as in MEMO's evaluation: FLOPs over achieved FLOP/s,
16 GB/s nominal of which some 11 arrive. The simulator's link is worse than the program believes: it starts late, and
both directions share.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from distrain.activation.link_sim import Link, simulate
from distrain.planners.activation_policy import ActivationTask, Policy, TensorGroup, choose
from distrain.planners.activation_policy.problem import Pass, uniform

from .harness import Row

HIDDEN, NUM_LAYERS, NUM_RANKS = 4096, 32, 8
ACHIEVED_FLOPS = 172e12
LINK_BYTES_S = 11e9
LINK = Link(
    out_bytes_s=LINK_BYTES_S, in_bytes_s=LINK_BYTES_S, both_bytes_s=1.6 * LINK_BYTES_S, latency_s=2e-5
)
KILO = 1024
LENGTHS = tuple(length * KILO for length in (32, 48, 64, 80, 96, 112, 128, 160, 192, 256))
STEPS = 32
"""grid points of alpha between 0 and 1"""
MIDDLE = (0.25, 0.75)
"""alphas between which neither simple answer is nearly right"""


@dataclass(frozen=True, slots=True)
class Point:
    """One sequence length."""

    length: int
    alpha: float
    """share of the tokens around attention that the program swaps, of layers that do not stay"""
    best_alpha: float
    """of the grid"""
    planned_stall: float
    stall: float
    adaptive_s: float
    best_s: float
    swap_all_s: float
    recompute_all_s: float

    @property
    def gain(self) -> float:
        """Over the better of swapping everything and recomputing whole layers."""
        return min(self.swap_all_s, self.recompute_all_s) / self.adaptive_s

    @property
    def is_middle(self) -> bool:
        """Whether the right answer lies in between."""
        return MIDDLE[0] <= self.best_alpha <= MIDDLE[1]

    def row(self) -> Row:
        """As a line of the table."""
        names = (
            "alpha",
            "best_alpha",
            "stall",
            "adaptive_s",
            "best_s",
            "swap_all_s",
            "recompute_all_s",
            "gain",
        )
        return {"tokens": self.length, **{name: getattr(self, name) for name in names}}


def task_of(length: int) -> ActivationTask:
    """The problem of one rank at ``length`` tokens; host memory is no limit and the device has no room to keep."""
    rows = length // NUM_RANKS
    unit = rows * HIDDEN * 2
    linear, attention = 2.0 * length * HIDDEN**2 / NUM_RANKS, 2.0 * length**2 * HIDDEN / NUM_RANKS
    forward_s = (12 * linear + attention) / ACHIEVED_FLOPS
    groups = (
        TensorGroup("input", unit, None),
        TensorGroup("attention", unit, None),
        TensorGroup("before_attention", 4 * unit, 3 * linear / ACHIEVED_FLOPS),
        TensorGroup("after_attention", 10 * unit, 5 * linear / ACHIEVED_FLOPS),
    )
    return ActivationTask(
        groups=groups,
        num_layers=NUM_LAYERS,
        num_tokens=rows,
        forward_s=forward_s,
        backward_s=(24 * linear + 2.5 * attention) / ACHIEVED_FLOPS,
        passes=(Pass(False, 0), Pass(True, 0)),
        d2h_bytes_s=LINK_BYTES_S,
        h2d_bytes_s=LINK_BYTES_S,
        host_bytes=1e15,
        device_bytes=2.0 * 16 * unit,
    )


def measure(length: int) -> Point:
    """Plan, and simulate the plan, a grid, and the simple answers."""
    task = task_of(length)
    choice = choose(task)
    adaptive = simulate(task, choice.policy, LINK)
    grid = {
        step / STEPS: simulate(task, _alpha(task, step / STEPS), LINK).total_s for step in range(STEPS + 1)
    }
    best_alpha = min(grid, key=lambda alpha: grid[alpha])
    compute_s = NUM_LAYERS * (task.forward_s + task.backward_s)
    return Point(
        length=length,
        alpha=_share(task, choice.policy),
        best_alpha=best_alpha,
        planned_stall=choice.replay.stall_s / choice.replay.total_s,
        stall=adaptive.stall_s / adaptive.total_s,
        adaptive_s=adaptive.total_s,
        best_s=grid[best_alpha],
        swap_all_s=grid[1.0],
        recompute_all_s=compute_s + NUM_LAYERS * task.forward_s,
    )


def _alpha(task: ActivationTask, alpha: float) -> Policy:
    return uniform(task, kept=(0, 0, 0, 0), swapped=(1, 1, alpha, alpha))


def _share(task: ActivationTask, policy: Policy) -> float:
    """Swapped bytes of the groups around attention over all of them, in layers that do not stay on the device."""
    leaving = range(task.num_layers - 2)
    swapped = total = 0.0
    for layer in leaving:
        for group, tokens in zip(task.groups[2:], policy.swapped[layer][2:], strict=True):
            swapped += group.num_bytes * tokens / task.num_tokens
            total += group.num_bytes
    return swapped / total


def points(*, quick: bool) -> Iterator[Point]:
    """One for each length."""
    for length in LENGTHS[2:3] if quick else LENGTHS:
        yield measure(length)
