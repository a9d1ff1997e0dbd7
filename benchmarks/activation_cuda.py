"""Activations on a GPU: how long a sequence may be, how fast steps are, and what the link and the allocator do.

Every attempt is a step of fresh layers; the longest length is found by doubling and bisection, in steps of 1,024
tokens, and an attempt fails by torch's out-of-memory error. The layers have 7B's shape; with 64 of them only lengths
count, so weights are of one layer, which all share, and the card's memory is for activations.

Nobody wins by other gradients: before anything is measured, all contenders must end a step with those of plain
PyTorch, to the bit.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn

from distrain.activation import ActivationManager, ActivationReport
from distrain.core.vocabulary import ModelShape
from distrain.planners.activation_plan import uniform

from .activation_contenders.base import Contender, Job
from .activation_contenders.ours import Ours
from .activation_contenders.peers import Checkpoint, OffloadActivations, SaveOnCpu
from .harness import Row, Session
from .intervals import paired_ratio

GRAIN = 1024
LONGEST = 4096 * GRAIN
DEPTHS = (8, 32, 64)
UNITS = 16
"""hidden states that a GPT layer leaves for its backward; a Llama layer's differ little"""
TRANSIENTS = 8
"""hidden states that a layer's backward makes besides"""
SPEED_LAYERS, SPEED_TOKENS = 8, 96 * GRAIN
PINNED_BYTES = 2**30


def shape_of(num_layers: int) -> ModelShape:
    """7B's layers."""
    return ModelShape(
        d_model=4096, num_layers=num_layers, num_heads=32, num_kv_heads=32, d_ffn=11008, vocab_size=32
    )


@dataclass(frozen=True, slots=True)
class SharedJob(Job):
    """Layers that are one layer, over and over."""

    def layers(self) -> nn.ModuleList:
        """The first layer, as often as there are layers."""
        one = Job(shape_of(1), self.num_tokens, self.device, self.dtype).layers()[0]
        return nn.ModuleList([nn.Sequential(one) for _ in range(self.shape.num_layers)])


KINDS: dict[str, Callable[[Job], Contender]] = {
    "none": Contender,
    "recompute": Checkpoint,
    "save_on_cpu": SaveOnCpu,
    "offload": OffloadActivations,
    "ours": lambda job: Ours(job, mode="memo", alpha=0.0),
}


CHECKED_LAYERS, CHECKED_TOKENS = 4, 4 * GRAIN


def check_gradients(session: Session, job: Job) -> None:
    """One step of every contender; gradients other than plain PyTorch's are a failure of the benchmark."""
    truth = KINDS["none"](job).gradients()
    kinds: dict[str, Callable[[Job], Contender]] = {
        **KINDS,
        "ours, half swapped": lambda job: Ours(job, mode="memo", alpha=0.5),
    }
    for name, kind in kinds.items():
        found = kind(job).gradients()
        same = len(found) == len(truth) and all(map(torch.equal, found, truth))
        session.row(contender=name, gradients_equal=same)
        if not same:
            session.failed.append(f"{name} has other gradients than plain PyTorch")


def fits(name: str, num_layers: int, num_tokens: int) -> bool:
    """Whether a step of ``num_tokens`` goes through."""
    torch.cuda.empty_cache()
    try:
        job = SharedJob(shape_of(num_layers), num_tokens, "cuda", torch.bfloat16)
        contender = KINDS[name](job)
        contender.step()
        torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        return False


def longest(name: str, num_layers: int) -> int:
    """The most tokens that fit, in steps of ``GRAIN``; 0 if none do."""
    low, high = 0, GRAIN
    while high <= LONGEST and fits(name, num_layers, high):
        low, high = high, 2 * high
    while high - low > GRAIN:
        middle = (low + high) // 2 // GRAIN * GRAIN
        low, high = (middle, high) if fits(name, num_layers, middle) else (low, middle)
    return low


def lengths(session: Session) -> list[Row]:
    """Longest sequences by depth, beside what the formula says of ours over recomputation."""
    rows = []
    for depth in DEPTHS[:1] if session.quick else DEPTHS:
        found: dict[str, int] = {}
        for name in ("none", "recompute", "ours"):
            session.say(f"longest sequence of {depth} layers, {name}")
            found[name] = longest(name, depth)
        ours = 2 * UNITS + TRANSIENTS
        rows.append(
            {
                "layers": depth,
                **found,
                "formula_over_none": (depth * UNITS + TRANSIENTS) / ours,
                "formula_over_recompute": (depth + UNITS + TRANSIENTS) / ours,
            }
        )
    return rows


def report_lengths(session: Session, rows: list[Row]) -> None:
    """Ratios; at 64 layers with the target."""
    session.rows += rows
    for row in rows:
        for theirs in ("none", "recompute"):
            session.metric(
                f"max_length_over_{theirs}_{row['layers']}",
                row["ours"] / row[theirs] if row[theirs] else math.nan,
                at_least=1.5 if row["layers"] == 64 else -math.inf,
                note=f"formula {row[f'formula_over_{theirs}']:.2f}",
            )


def speeds(session: Session) -> list[Row]:
    """Seconds of steps, in turn; contenders that do not fit have none."""
    job = Job(
        shape_of(2 if session.quick else SPEED_LAYERS),
        GRAIN if session.quick else SPEED_TOKENS,
        "cuda",
        torch.bfloat16,
    )
    kinds: dict[str, Callable[[Job], Contender]] = {**KINDS, "ours": _planned}
    rows: dict[str, Row] = {name: {"contender": name, "steps_s": []} for name in kinds if name != "none"}
    for number in range(session.rounds):
        session.say(f"round {number + 1} of {session.rounds}")
        for name, row in rows.items():
            _turn(kinds[name], job, row)
    return list(rows.values())


def _planned(job: Job) -> Ours:
    """Ours with the alpha that the measured link hides behind a measured layer."""
    return Ours(job, mode="memo", alpha=hidden_alpha(job))


def hidden_alpha(job: Job) -> float:
    """MEMO's overlap row, from the time of a layer's forward and the bandwidth of the link on this card."""
    layer, x = job.layers()[0], job.sample()
    with torch.no_grad():
        layer(x)
        forward_s = _seconds(lambda: layer(x))
    unit = x.nbytes
    budget = forward_s * pinned_bandwidth()
    return min(1.0, max(0.0, (budget - 2 * unit) / ((UNITS - 2) * unit)))


def _turn(kind: Callable[[Job], Contender], job: Job, row: Row) -> None:
    torch.cuda.empty_cache()
    try:
        contender = kind(job)
        contender.step()
        torch.cuda.reset_peak_memory_stats()
        row["steps_s"].append(_seconds(contender.step))
    except torch.OutOfMemoryError:
        row["steps_s"].append(math.inf)
        return
    stats = torch.cuda.memory_stats()
    row["reserved_over_allocated"] = stats["reserved_bytes.all.peak"] / stats["allocated_bytes.all.peak"]
    row["peak_bytes"] = stats["allocated_bytes.all.peak"]


def report_speeds(session: Session, rows: list[Row]) -> None:
    """Ratios of tokens per second; not resolved where somebody does not fit."""
    by_name = {row["contender"]: row for row in rows}
    for row in rows:
        row["step_s"] = statistics.median(row["steps_s"])
    session.rows += rows
    targets = {"recompute": 1.20, "save_on_cpu": 3.0, "offload": -math.inf}
    ours = by_name["ours"]
    for name, at_least in targets.items():
        metric = "tokens_per_s_over_recompute" if name == "recompute" else f"over_{name}"
        theirs = by_name[name]["steps_s"]
        measured = all(map(math.isfinite, (*theirs, *ours["steps_s"])))
        ratio = paired_ratio(theirs, ours["steps_s"]) if measured else None
        note = str(ratio) if ratio else "does not fit"
        session.metric(metric, ratio.median if ratio else math.nan, at_least=at_least, note=note)
    session.metric("reserved_over_allocated", ours.get("reserved_over_allocated", math.nan), at_most=1.01)


def pinned_bandwidth() -> float:
    """Bytes/s from device to pinned host memory, the best of a few copies."""
    host = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.zeros(PINNED_BYTES, dtype=torch.uint8, device="cuda")
    return PINNED_BYTES / min(_seconds(lambda: host.copy_(device, non_blocking=True)) for _ in range(5))


def copied_share(session: Session) -> float:
    """Bandwidth of a layer's swap, as the manager does it, over that of plain pinned copies."""
    num_tokens = GRAIN if session.quick else 32 * GRAIN
    job = Job(shape_of(1), num_tokens, "cuda", torch.bfloat16)
    layers, x = job.layers(), job.sample()
    plan = uniform("swap", num_layers=3, num_tokens=num_tokens)
    plan = type(plan)(layers=plan.layers[:1])
    shares = []
    with ActivationManager(layers, plan) as manager:
        for _ in range(3):
            y = layers[0](x)
            torch.cuda.synchronize()
            manager.report()
            seconds, moved = _swap_seconds(manager, layers[0], x)
            shares.append(moved.swapped_bytes / seconds / pinned_bandwidth())
            del y
    known = [share for share in shares if not math.isnan(share)]
    return statistics.median(known) if known else math.nan


def _swap_seconds(manager: ActivationManager, layer: nn.Module, x: Tensor) -> tuple[float, ActivationReport]:
    """Time from the end of a layer's forward to that of its swap."""
    with torch.no_grad():
        alone_s = _seconds(lambda: layer(x))
    kept: list[Any] = []
    total_s = _seconds(lambda: kept.append(layer(x)))
    more_s = total_s - alone_s
    return more_s if more_s > 0 else math.nan, manager.report()  # nothing is known where noise is larger


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def run_on_cuda(session: Session) -> None:
    """All of it; results that are to be kept go to benchmarks/results with the card's name and the date."""
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA device here\ntry: --device cpu")
    session.machine["gpu"] = torch.cuda.get_device_name()
    check_gradients(session, Job(shape_of(CHECKED_LAYERS), CHECKED_TOKENS, "cuda", torch.bfloat16))
    report_lengths(session, session.part("lengths", lambda: lengths(session)))
    report_speeds(session, session.part("speeds", lambda: speeds(session)))
    session.metric("d2h_share", copied_share(session), at_least=0.85, note="of measured pinned bandwidth")
    card = session.machine["gpu"].lower().replace(" ", "-")
    session.say(f"keep as benchmarks/results/activation-{card}-{date.today().isoformat()}.json")
