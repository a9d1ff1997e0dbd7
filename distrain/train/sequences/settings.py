"""What ``[parallel] sequence`` asks for, worked out and checked against the model and the cost model."""

from dataclasses import dataclass

from distrain.core.config import DataConfig, RunConfig
from distrain.core.errors import ConfigError, Problem
from distrain.core.vocabulary import PRESETS, Sequences
from distrain.parallel.sequence.layout import usp_degrees
from distrain.planners.parallel_plan import ParallelPlan
from distrain.planners.sequence.cost import SequenceCost, load


@dataclass(frozen=True, slots=True)
class SequenceSettings:
    """How the ``num_slots`` data-parallel places of a run share sequences."""

    kind: Sequences
    num_slots: int
    num_heads: int
    """on each rank of tensor parallelism"""
    degree: int
    """of every group; 0 for adaptive"""
    ring: int
    """of every group; 0 is what the heads leave"""
    cost: SequenceCost | None
    """of adaptive plans"""

    @classmethod
    def of(cls, config: RunConfig, plan: ParallelPlan) -> "SequenceSettings | None":
        """Those of a checked config under its layout; None if ranks share no sequences."""
        parallel, shape = config.parallel, config.model.shape()
        if parallel.sequence is Sequences.NONE:
            return None
        return cls(
            kind=parallel.sequence,
            num_slots=plan.degrees.dp,
            num_heads=shape.num_heads // plan.degrees.tp,
            degree=parallel.sequence_degree,
            ring=parallel.sequence_ring,
            cost=load(parallel.sequence_cost) if parallel.sequence is Sequences.ADAPTIVE else None,
        )

    @property
    def is_planned(self) -> bool:
        """Whether each batch has a plan of its own."""
        return self.cost is not None

    def counted_micro_batches(self, plan: ParallelPlan) -> int:
        """Micro-batches for estimates: with plans, so many that the pipeline is full and gradients add up."""
        return max(2, plan.degrees.pp) if self.is_planned else plan.micro_batches

    @property
    def cost_model(self) -> SequenceCost:
        """``cost``, where plans are adaptive."""
        assert self.cost is not None
        return self.cost

    def split(self, degree: int) -> tuple[int, int]:
        """(ulysses, ring) of a group: all Ulysses while the heads can be shared out evenly, a ring for the rest."""
        match self.kind:
            case Sequences.ULYSSES:
                return degree, 1
            case Sequences.RING:
                return 1, degree
            case Sequences.USP if self.ring:
                return degree // self.ring, self.ring
        return usp_degrees(degree, num_heads=self.num_heads)

    def packed_tokens(self, data: DataConfig, *, micro_batches: int) -> int:
        """Tokens that one rank has of a micro-batch at the most."""
        if self.cost is not None:
            return self.cost.tokens_per_gpu
        rows = data.global_batch * self.degree // (self.num_slots * micro_batches)
        return -(-rows * data.seq_len // self.degree)

    def describe(self) -> str:
        """One line for people."""
        if self.cost is None:
            ulysses, ring = self.split(self.degree)
            parts = (
                f"{self.num_slots // self.degree} groups of {self.degree} = ulysses {ulysses} x ring {ring}"
            )
            return f"{self.kind}: {parts}"
        degrees = ", ".join(map(str, self.cost.degrees(self.num_slots)))
        return (
            f"adaptive: groups of {degrees} of {self.num_slots} slots, planned for each batch,"
            f" {self.cost.tokens_per_gpu:,} tokens a rank and micro-batch"
        )


def check_sequences(config: RunConfig, world_size: int) -> list[Problem]:
    """What is wrong with the cost model of adaptive plans; ``core.checks.check_run`` has looked at the rest."""
    parallel, data = config.parallel, config.data
    if parallel.sequence is not Sequences.ADAPTIVE or not parallel.sequence_cost:
        return []
    try:
        cost = load(parallel.sequence_cost)
    except ConfigError as error:
        return list(error.problems)
    problems = []
    if config.model.preset in PRESETS:
        shape = config.model.shape()
        if (cost.layers, cost.hidden) != (shape.num_layers, shape.d_model):
            problems.append(
                Problem(
                    "the cost model is that of another model",
                    f"{parallel.sequence_cost}: {cost.layers} layers, hidden {cost.hidden}",
                    f"{shape.num_layers} layers, hidden {shape.d_model}",
                    "distrain doctor --profile",
                )
            )
    widest = cost.degrees(max(1, parallel.degrees(world_size).dp))[-1]
    if data.seq_len > cost.capacity(widest):
        problems.append(
            Problem(
                "the longest sequence does not fit the widest group",
                f"seq_len = {data.seq_len}, {cost.tokens_per_gpu} tokens on each of {widest} ranks",
                f"at most {cost.capacity(widest)} tokens",
                f"--set data.seq_len={cost.capacity(widest)}",
            )
        )
    return problems
