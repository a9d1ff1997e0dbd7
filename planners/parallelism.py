"""Chooses the layout of a run: every layout of a grid is tried, so the best one found is the best there is.

The grid holds every layout that ``core.layout.check_layout`` accepts, with tensor parallelism inside a node
(PTD-P, takeaway 1), replicas of all kinds but HSDP, and no device left over. It has some thousands of
members even for thousands of devices, each of which is priced in microseconds (``cost.py``) and sized
(``memory.py``).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd, isqrt

from distrain.core.errors import InfeasibleError, Problem, raise_if
from distrain.core.layout import check_model
from distrain.core.vocabulary import ClusterSpec, DataParallel, Degrees, ModelShape, Schedule

from .cost import Calibration, StepTime, step_time
from .memory import MemoryEstimate, estimate, gib
from .parallel_plan import ParallelPlan

__all__ = ["ParallelPlan", "choose"]

# Of two layouts that take as long, the one with the plainer words wins.
_SCHEDULES = (Schedule.ONE_F_ONE_B, Schedule.ZBV, Schedule.INTERLEAVED, Schedule.GPIPE)
_DATA = (DataParallel.DDP, DataParallel.ZERO1, DataParallel.FSDP2)


@dataclass(frozen=True, slots=True)
class Layout:
    """One point of the grid."""

    degrees: Degrees
    schedule: Schedule
    data: DataParallel
    micro_batches: int

    def __str__(self) -> str:
        degrees = self.degrees
        words = [f"tp {degrees.tp} x pp {degrees.pp} x dp {degrees.dp}"]
        words += [str(self.data)] if degrees.dp > 1 else []
        words += [str(self.schedule)] if degrees.pp > 1 else []
        words += [f"{degrees.vpp} stages a rank"] if degrees.vpp > 1 else []
        words += [f"{self.micro_batches} micro-batch" + "es" * (self.micro_batches > 1)]
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Priced:
    """A layout with what it takes."""

    layout: Layout
    time: StepTime
    memory: MemoryEstimate

    def order(self) -> tuple[float, int, int, int, int, int, int]:
        """Faster first; ties go to fewer parts."""
        layout, degrees = self.layout, self.layout.degrees
        plain = (
            _SCHEDULES.index(layout.schedule),
            degrees.vpp,
            _DATA.index(layout.data),
            layout.micro_batches,
        )
        return (self.time.total_s, degrees.tp, degrees.pp, *plain)


def choose(
    shape: ModelShape,
    cluster: ClusterSpec,
    *,
    global_batch: int,
    seq_len: int,
    dtype: str = "bfloat16",
    optimizer: str = "adamw",
    calibration: Calibration | None = None,
) -> ParallelPlan:
    """The layout on all devices of ``cluster`` with the least estimated time a step that fits its memory.

    Raises ConfigError if the model or the batch is impossible by itself, and InfeasibleError if no layout
    exists or none fits, which then says how much the closest one lacks. The same arguments give the same
    layout.
    """
    start = time.perf_counter()
    raise_if(_problems(shape, cluster, global_batch, seq_len))
    rates = calibration or Calibration.of(cluster.device)
    priced = [
        price(
            shape,
            layout,
            global_batch=global_batch,
            seq_len=seq_len,
            dtype=dtype,
            optimizer=optimizer,
            cluster=cluster,
            calibration=rates,
        )
        for layout in grid(shape, cluster, global_batch=global_batch, seq_len=seq_len)
    ]
    fitting = sorted((p for p in priced if not p.memory.shortfall_bytes), key=Priced.order)
    if not fitting:
        raise _infeasible(priced, cluster, global_batch)
    best = fitting[0]
    return ParallelPlan(
        world_size=cluster.world_size,
        degrees=best.layout.degrees,
        schedule=best.layout.schedule,
        data=best.layout.data,
        micro_batches=best.layout.micro_batches,
        objective=best.time.total_s,
        bound=best.time.total_s,
        gap=0.0,
        status="optimal over the grid",
        seconds=time.perf_counter() - start,
        reasons=tuple(_reasons(priced, fitting)),
    )


def grid(shape: ModelShape, cluster: ClusterSpec, *, global_batch: int, seq_len: int) -> Iterator[Layout]:
    """Every layout that ``choose`` weighs."""
    shared = gcd(shape.num_heads, shape.num_kv_heads, shape.d_ffn, shape.vocab_size, seq_len)
    for tp in _divisors(gcd(shared, cluster.devices_per_node)):
        for pp in _divisors(cluster.world_size // tp):
            dp = cluster.world_size // (tp * pp)
            if pp > shape.num_layers or global_batch % dp:
                continue
            for schedule, vpp in _schedules(pp, shape.num_layers):
                for micro_batches in _divisors(global_batch // dp):
                    if schedule is Schedule.INTERLEAVED and micro_batches % pp:
                        continue
                    for data in _DATA if dp > 1 else _DATA[:1]:
                        shard = dp if data is DataParallel.FSDP2 else 1
                        degrees = Degrees(tp=tp, pp=pp, dp=dp, vpp=vpp, dp_shard=shard)
                        yield Layout(degrees, schedule, data, micro_batches)


def price(
    shape: ModelShape,
    layout: Layout,
    *,
    global_batch: int,
    seq_len: int,
    dtype: str,
    optimizer: str,
    cluster: ClusterSpec,
    calibration: Calibration,
) -> Priced:
    """Time and memory of one layout."""
    micro_batch_size = global_batch // (layout.degrees.dp * layout.micro_batches)
    seconds = step_time(
        shape,
        layout.degrees,
        schedule=layout.schedule,
        data=layout.data,
        micro_batch_size=micro_batch_size,
        seq_len=seq_len,
        micro_batches=layout.micro_batches,
        dtype=dtype,
        cluster=cluster,
        calibration=calibration,
    )
    memory = estimate(
        shape,
        layout.degrees,
        schedule=layout.schedule,
        data=layout.data,
        micro_batch_size=micro_batch_size,
        seq_len=seq_len,
        micro_batches=layout.micro_batches,
        dtype=dtype,
        optimizer=optimizer,
        cluster=cluster,
    )
    return Priced(layout, seconds, memory)


def _schedules(pp: int, num_layers: int) -> Iterator[tuple[Schedule, int]]:
    """Schedules of ``pp`` ranks, with stages a rank; without a pipeline they are all the same."""
    yield Schedule.ONE_F_ONE_B, 1
    if pp == 1:
        return
    yield Schedule.GPIPE, 1
    if 2 * pp <= num_layers:
        yield Schedule.ZBV, 2
    if num_layers % pp == 0:
        yield from ((Schedule.INTERLEAVED, vpp) for vpp in _divisors(num_layers // pp) if vpp > 1)


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _problems(shape: ModelShape, cluster: ClusterSpec, global_batch: int, seq_len: int) -> list[Problem]:
    """What no layout can mend."""
    sizes = {
        "the number of nodes": cluster.num_nodes,
        "cluster.devices_per_node": cluster.devices_per_node,
        "data.global_batch": global_batch,
    }
    problems = [
        Problem(f"{name} is out of range", str(size), "1 or more") for name, size in sizes.items() if size < 1
    ]
    return problems + check_model(shape, Degrees(), schedule=Schedule.ONE_F_ONE_B, seq_len=seq_len)


def _infeasible(priced: list[Priced], cluster: ClusterSpec, global_batch: int) -> InfeasibleError:
    world = cluster.world_size
    if not priced:
        return InfeasibleError(
            "no layout uses every device",
            got=f"{world} devices, data.global_batch = {global_batch}",
            allowed="a batch that some number of replicas divides, the other devices shared by tp and pp",
            hint=f"--set data.global_batch={-(-global_batch // world) * world}",
        )
    closest = min(priced, key=lambda p: (p.memory.shortfall_bytes, p.order()))
    problems = closest.memory.problems()
    lacks = gib(closest.memory.shortfall_bytes)
    return InfeasibleError(
        "no layout fits the memory",
        got=f"the closest of {len(priced):,}, {closest.layout}, lacks {lacks}: "
        + "; ".join(problem.got for problem in problems),
        allowed="; ".join(problem.allowed for problem in problems),
        hint="more devices, a shorter data.seq_len, or a smaller model",
    )


def _reasons(priced: list[Priced], fitting: list[Priced]) -> Iterator[str]:
    """Why the first of ``fitting`` (in order) was taken, in sentences."""
    best = fitting[0]
    parts = [f"{name} {seconds:.3g} s" for name, seconds in best.time.parts().items() if seconds]
    yield f"{best.layout}: {best.time.total_s:.4g} s a step: {', '.join(parts)}"
    yield (
        f"pipeline rank {best.memory.worst_rank} needs most memory, {gib(best.memory.peak_bytes)} of"
        f" {gib(best.memory.device_limit_bytes)}"
    )
    yield f"{len(priced):,} layouts tried, {len(priced) - len(fitting):,} of them do not fit"
    faster = [p for p in priced if p.memory.shortfall_bytes and p.order() < best.order()]
    if faster:
        first = min(faster, key=Priced.order)
        yield (
            f"{len(faster):,} would be faster but do not fit; the fastest, {first.layout}, would take"
            f" {first.time.total_s:.4g} s and lacks {gib(first.memory.shortfall_bytes)}"
        )
    if len(fitting) > 1:
        second = fitting[1]
        more = second.time.total_s / best.time.total_s - 1
        yield f"runner-up: {second.layout}, {second.time.total_s:.4g} s (+{more:.2%})"
