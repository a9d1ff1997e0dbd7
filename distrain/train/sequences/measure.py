"""Times micro-batches on groups of every degree: ``python -m distrain.train.sequences.measure CONFIG OUT``.

One rank of a job that computes what training computes, on random tokens: the same stages, groups and kernels. A sample
is what one more micro-batch adds to a step, so that what a step costs whatever is in it (reductions, the pipeline's
ends) drops out::

    few  = a step of n micro-batches,  many = a step of 3 n        n = 1; with a pipeline its depth
    sample = (many - few) / 2 n                                    medians of rounds in which all shapes take turns
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console

from distrain.core.config import RunConfig
from distrain.core.load import load
from distrain.parallel import MicroBatch, Parallel, init
from distrain.parallel.sequence.adaptive import SequenceGroups, places
from distrain.parallel.sequence.layout import usp_degrees
from distrain.parallel.tensor import loss_context
from distrain.planners.memory import PROCESS_BYTES, MemoryEstimate, estimate
from distrain.planners.parallel_plan import ParallelPlan
from distrain.planners.sequence.fit import Sample
from distrain.planners.sequence.step_plan import SequenceGroup, StepPlan
from distrain.train.assembly import assemble
from distrain.train.machine import Machine
from distrain.train.plan import plan_of_job
from distrain.train.precision import DTYPES, products

from .profile import Profile, degrees, shapes

ROUNDS = 5
"""beside one to warm up"""
BUDGET_S = 90.0
"""after which no round begins"""


class Bench:
    """The model of one rank, and how long micro-batches take on it."""

    def __init__(self, config: RunConfig, plan: ParallelPlan, parallel: Parallel) -> None:
        """All ranks make one at the same time."""
        self._config, self._plan, self._parallel = config, plan, parallel
        self._shape = config.model.shape()
        self._num_slots = plan.degrees.dp
        self._few = plan.degrees.pp
        self._random = torch.Generator().manual_seed(config.seed)
        self._assembly = assemble(
            self._shape,
            parallel,
            schedule=plan.schedule,
            data=plan.data,
            micro_batches=self._few,
            seed=config.seed,
            dtype=DTYPES[config.train.dtype],
        )
        heads = self._shape.num_heads // plan.degrees.tp
        self._split = lambda degree: usp_degrees(degree, num_heads=heads)
        self._groups = SequenceGroups(
            dist.get_process_group_ranks(parallel.groups.axis("dp")),
            slot=parallel.coordinates["dp"],
            groups=parallel.groups,
            split=self._split,
            window=self._shape.window,
            device=parallel.device.torch_device,
        )

    def sample_ms(self, lengths: tuple[int, ...], degree: int) -> float:
        """What one micro-batch takes in which every group of ``degree`` has sequences of these ``lengths``."""
        few, many = (self._step_ms(lengths, degree, count * self._few) for count in (1, 3))
        return (many - few) / (2 * self._few)

    def peak_bytes(self, num_tokens: int) -> int:
        """Memory of a device while each rank computes one sequence of ``num_tokens``, on the rank that needs most.

        Of a CPU it is a rank's share of the host, and estimated: what a process holds says little of its tensors.
        """
        device = self._parallel.device
        if device.torch_device.type == "cpu":
            return self._estimate(num_tokens).host_bytes // self._plan.world_size
        device.reset_peak_memory()
        self._step_ms((num_tokens,), 1, self._few)
        return int(self.agreed(device.peak_memory_bytes()))

    def limit_bytes(self) -> int:
        """What ``peak_bytes`` may reach; there is no optimizer here, whose states need room in training."""
        memory = self._estimate(1)
        if self._parallel.device.torch_device.type == "cpu":
            of_device = memory.device_limit_bytes + PROCESS_BYTES["cpu"]
            return min(of_device, memory.host_limit_bytes // self._plan.world_size)
        return memory.device_limit_bytes - memory.ranks[memory.worst_rank].optimizer_bytes

    def _step_ms(self, lengths: tuple[int, ...], degree: int, num_micro_batches: int) -> float:
        """A step of equal micro-batches; the slowest rank counts."""
        micro_batches = self._micro_batches(lengths, degree, num_micro_batches)
        self._assembly.data.begin(num_micro_batches)
        self._assembly.loss.num_tokens = sum(lengths)
        dist.barrier()
        self._parallel.device.synchronize()
        start = time.perf_counter()
        dtype, device = self._config.train.dtype, self._parallel.device.torch_device
        with products(dtype, device), loss_context(self._plan.degrees.tp):
            self._assembly.runtime.step(micro_batches)
        self._assembly.data.reduce()
        self._parallel.device.synchronize()
        took_ms = 1e3 * (time.perf_counter() - start)
        self._assembly.data.updated()
        return self.agreed(took_ms)

    def agreed(self, number: float) -> float:
        """The largest of all ranks' numbers."""
        largest = torch.tensor(number, dtype=torch.float64, device=self._parallel.device.torch_device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def _micro_batches(self, lengths: tuple[int, ...], degree: int, count: int) -> list[MicroBatch]:
        plan, every = _plan(lengths, degree, count, num_slots=self._num_slots)
        tp = self._plan.degrees.tp
        mine = places(plan, every, slot=self._parallel.coordinates["dp"], split=self._split, multiple_of=tp)
        rows = self._groups.rows(plan, mine)
        found = []
        for place, row in zip(mine, rows, strict=True):
            num_local = place.layout.num_local
            ids = torch.randint(self._shape.vocab_size, (1, num_local), generator=self._random)
            tokens = ids.to(self._parallel.device.torch_device)
            found.append(MicroBatch(tokens, tokens, (1, num_local // tp, self._shape.d_model), packed=row))
        return found

    def _estimate(self, num_tokens: int) -> MemoryEstimate:
        machine = Machine.of(self._config, world_size=self._plan.world_size, here=True)
        return estimate(
            self._shape,
            self._plan.degrees,
            schedule=self._plan.schedule,
            data=self._plan.data,
            micro_batch_size=1,
            seq_len=num_tokens,
            micro_batches=max(2, self._few),
            dtype=self._config.train.dtype,
            optimizer=self._config.optimizer.name,
            cluster=machine.cluster,
            packed_tokens=num_tokens,
        )


def measure(config: RunConfig, plan: ParallelPlan, parallel: Parallel) -> Profile:
    """Time everything; the same profile on every rank."""
    bench, longest = Bench(config, plan, parallel), config.data.seq_len
    wanted = [(lengths, degree) for degree in degrees(plan.degrees.dp) for lengths in shapes(longest)]
    taken: list[list[float]] = [[] for _ in wanted]
    start = time.monotonic()
    with _progress(parallel.rank, total=(1 + ROUNDS) * len(wanted)) as advance:
        for _ in range(1 + ROUNDS):
            for times, (lengths, degree) in zip(taken, wanted, strict=True):
                times.append(bench.sample_ms(lengths, degree))
                advance()
            if bench.agreed(time.monotonic() - start) > BUDGET_S:
                break
        memory = [(tokens, bench.peak_bytes(tokens)) for tokens in (longest // 4, longest // 2, longest)]
    samples = [
        Sample(lengths, degree, max(median(times[1:] or times), 1e-6))
        for times, (lengths, degree) in zip(taken, wanted, strict=True)
    ]
    machine = Machine.of(config, world_size=plan.world_size, here=True)
    return Profile(
        samples=tuple(samples),
        memory=tuple(memory),
        limit_bytes=bench.limit_bytes(),
        device=f"{plan.world_size} x {machine.cluster.device.name}",
        date=date.today().isoformat(),
    )


def _plan(lengths: tuple[int, ...], degree: int, count: int, *, num_slots: int) -> tuple[StepPlan, list[int]]:
    """``count`` micro-batches in which every group of ``degree`` has sequences of ``lengths``, and all lengths."""
    per_batch = num_slots // degree
    batches = []
    for batch in range(count):
        groups = []
        for group in range(per_batch):
            first = (batch * per_batch + group) * len(lengths)
            slots = tuple(range(group * degree, (group + 1) * degree))
            groups.append(SequenceGroup(slots, tuple(range(first, first + len(lengths))), 0.0))
        batches.append(tuple(groups))
    plan = StepPlan(
        microbatches=tuple(batches),
        num_slots=num_slots,
        schedule="lock-step",
        estimated_ms=0.0,
        lower_bound_ms=0.0,
        gap=0.0,
        status="feasible",
        seconds=0.0,
        baselines={},
        reasons=(),
    )
    return plan, list(lengths) * (count * per_batch)


@contextmanager
def _progress(rank: int, *, total: int) -> Iterator[Callable[[], None]]:
    """Rank 0 shows how far it is."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=rank != 0, transient=True) as progress:
        task = progress.add_task("timing groups", total=total)
        yield lambda: progress.advance(task)


def main(argv: Sequence[str]) -> int:
    """Arguments: a config, whose seq_len is the longest group, and the file to write."""
    config = load(argv[0]).config
    plan = plan_of_job(config)
    parallel = init(
        plan, device=config.launch.device, timeout=timedelta(seconds=config.timeouts.collective_s)
    )
    profile = measure(config, plan, parallel)
    if parallel.rank == 0:
        profile.save(Path(argv[1]))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # the launcher says so once, for all ranks
        sys.exit(130)
