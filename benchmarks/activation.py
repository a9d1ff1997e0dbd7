"""Keeping activations until backward: memory and time of our manager, of PyTorch's means and of a fine-tuning library.

All contenders run the same layers on the same input and must end with the gradients of plain PyTorch, to the bit.
Peaks are counted from live tensors, in the same way for all (``activation_memory``); steps take turns, and ratios of
times are paired by round. What a slow link does is simulated (``activation_link``), what following an address plan
costs is measured by ``benchmarks.allocator``. With ``--device cuda`` lengths, speeds and bandwidths are measured on the
card (``activation_cuda``).

::

    python -m benchmarks.activation [--device cpu|cuda] [--quick] [--rounds N] [--json FILE]
"""

import math
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

from .harness import Row, Session, main
from .intervals import paired_ratio

if TYPE_CHECKING:
    from .activation_contenders.base import Contender, Job

MOST_OVERHEAD = 1.05
NUM_LAYERS = 12


def job_of(*, quick: bool) -> "Job":
    """The layers that are measured on a processor."""
    from distrain.core.vocabulary import ModelShape

    from .activation_contenders.base import Job

    width, num_tokens = (64, 256) if quick else (256, 1024)
    shape = ModelShape(
        d_model=width,
        num_layers=4 if quick else NUM_LAYERS,
        num_heads=4,
        num_kv_heads=4,
        d_ffn=width * 8 // 3 // 32 * 32,
        vocab_size=32,
    )
    return Job(shape, num_tokens)


def contenders(job: "Job", *, quick: bool) -> "dict[str, Contender]":
    """Everybody; ours alone, beside the plain way that it is held against, if ``quick``."""
    from .activation_contenders.base import Contender
    from .activation_contenders.ours import Ours
    from .activation_contenders.peers import Checkpoint, OffloadActivations, SaveOnCpu

    peers = {"checkpoint": Checkpoint, "save_on_cpu": SaveOnCpu, "offload": OffloadActivations}
    return {
        "none": Contender(job),
        **({} if quick else {name: kind(job) for name, kind in peers.items()}),
        "ours, recompute": Ours(job, mode="recompute"),
        "ours, swap": Ours(job, mode="swap"),
        "ours, memo": Ours(job, mode="memo", alpha=0.5),
    }


def measure(session: Session) -> list[Row]:
    """Peak bytes and seconds of a step of each contender; wrong gradients are a problem, not a result."""
    import torch

    from .activation_memory import peak_bytes

    torch.set_num_threads(1)
    everybody = contenders(job_of(quick=session.quick), quick=session.quick)
    truth = everybody["none"].gradients()
    rows: dict[str, Row] = {}
    for name, contender in everybody.items():
        found = contender.gradients()
        same = len(found) == len(truth) and all(map(torch.equal, found, truth))
        rows[name] = {
            "contender": name,
            "problem": "" if same else "other gradients than plain PyTorch's",
            "peak_bytes": peak_bytes(contender),
            "steps_s": [],
        }
    for number in range(session.rounds):
        session.say(f"round {number + 1} of {session.rounds}")
        order = list(everybody) if number % 2 else list(everybody)[::-1]
        for name in order:
            start = time.process_time()
            everybody[name].step()
            rows[name]["steps_s"].append(time.process_time() - start)
    for row in rows.values():
        row["step_s"] = statistics.median(row["steps_s"])
    return list(rows.values())


def planned_bytes(job: "Job") -> int:
    """The most that memo should have on the device, from a trace of one layer: nothing is run.

    Two rounding buffers, whatever one layer's backward makes and lets go at a time, the gradients that it is given and
    returns among it, and what the loss keeps: the last hidden state.
    """
    import torch

    from distrain.activation.trace import trace_module
    from distrain.planners.buffers import Buffer
    from distrain.planners.buffers.bounds import max_live

    found = trace_module(job.layers()[0], torch.empty_like(job.sample(), device="meta"))
    made = [each for each in found.tensors if each.birth > found.forward_end and each.num_bytes]
    buffers = [Buffer(str(i), each.birth, each.death, each.num_bytes) for i, each in enumerate(made)]
    return 2 * found.skeletal_bytes + max_live(buffers)[0] + job.sample().nbytes


def report(session: Session, rows: list[Row]) -> None:
    """Metrics of what was measured."""
    by_name = {row["contender"]: row for row in rows}
    session.rows += rows
    session.failed += [
        f"{name}: {row['problem']}" for name, row in by_name.items() if row["problem"] and "ours" in name
    ]
    memo, none = by_name["ours, memo"], by_name["none"]
    planned = planned_bytes(job_of(quick=session.quick))
    session.metric("planned_bytes", planned)
    session.metric("peak_over_plan", memo["peak_bytes"] / planned, at_most=1.02)
    note = f"{NUM_LAYERS} layers" if not session.quick else "4 layers"
    session.metric("peak_over_none", memo["peak_bytes"] / none["peak_bytes"], at_most=0.34, note=note)
    if "checkpoint" not in by_name:
        return
    ours, theirs = by_name["ours, recompute"]["steps_s"], by_name["checkpoint"]["steps_s"]
    ratio = paired_ratio(ours, theirs)
    overhead = ratio.resolved(at_least=MOST_OVERHEAD, allowed=MOST_OVERHEAD - 1)
    session.metric("hook_overhead_over_checkpoint", overhead, at_most=MOST_OVERHEAD, note=str(ratio))
    for name in ("checkpoint", "save_on_cpu", "offload"):
        peak = memo["peak_bytes"] / by_name[name]["peak_bytes"]
        session.metric(f"peak_over_{name}", peak, note="ours, memo")
        times = paired_ratio(memo["steps_s"], by_name[name]["steps_s"])
        session.metric(f"time_over_{name}", times.median, note=f"ours, memo: {times}")


def simulated(session: Session) -> None:
    """What the program's policy does on a simulated link."""
    from .activation_link import points

    found = list(points(quick=session.quick))
    session.rows += [each.row() for each in found]
    hidden = [each.stall for each in found if each.planned_stall < 0.01]
    session.metric("swap_stall", max(hidden, default=math.nan), at_most=0.03, note="worst length")
    distance = max(abs(each.alpha - each.best_alpha) for each in found)
    session.metric("alpha_distance", distance, at_most=1 / 16, note="worst length")
    middle = [each.gain for each in found if each.is_middle]
    gain = statistics.median(middle) if middle else math.nan
    note = (
        f"median of {len(middle)} lengths with alpha in the middle; least {min(middle, default=math.nan):.3f}"
    )
    session.metric("adaptive_gain_mid", gain, at_least=1.10, note=note)


def allocator(session: Session) -> None:
    """What following an address plan costs; see ``benchmarks.allocator``."""
    from .allocator import MOST_OVERHEAD as MOST
    from .allocator import allocator_overhead

    found = allocator_overhead(rounds=session.rounds)
    session.metric("allocator_overhead", found.resolved, at_most=MOST, note=str(found.ratio))


def run(session: Session) -> None:
    """All of it."""
    if session.device == "cuda":
        from .activation_cuda import run_on_cuda

        run_on_cuda(session)
        return
    report(session, session.part("steps", partial(measure, session)))
    simulated(session)
    if not session.quick:
        allocator(session)


if __name__ == "__main__":
    main("activation", run, rounds=15, devices=("cpu", "cuda"))
