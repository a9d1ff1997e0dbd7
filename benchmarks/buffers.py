"""How good the buffer planner is, and how fast: hard instances, training traces, MEMO's programs, a whole plan.

Hard instances are generated so that exactly as much lives at the worst moment as there is room for: a rectangle of
time by capacity is cut into pieces, at random and also into pinwheels, which no straight cut takes apart; then pieces
away from the worst moments are dropped or shortened. Heuristics end 10 to 40 % above the capacity. Each is solved at
several seeds of the search, under its capacity, and each answer is checked by a sweep that shares nothing with the
search. The recipes are of kinds that the search can solve; of which it cannot, docs/decisions/0007 tells.

Traces are training steps on fake tensors, up to 20,000 buffers: models of 7B and 65B width, with and without
checkpointing, and micro-batches of different lengths in a pipeline's order. A gap is held against the max-live bound,
so it overstates the distance to the best plan.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from distrain.activation import trace_module
from distrain.activation.layer_facts import layer_facts
from distrain.activation.rank_layers import rank_layer
from distrain.core.vocabulary import PRESETS
from distrain.planners.buffers import Buffer, milp, solve, violations
from distrain.planners.buffers.bounds import sections
from distrain.planners.buffers.engine import build
from distrain.planners.memory_plan import memo_of_the_paper, plan_memory
from distrain.planners.memory_request import MemoryRequest

from .buffer_traces import steps
from .harness import Session, main

CAPACITY = 1 << 20
HORIZON = 4096
GRAIN = 1024
SEEDS = 3
LIMIT_S = 30.0
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an instance is made: its size, and what is done to the pieces."""

    num: int
    pinwheels: float
    """chance that a piece is cut into five around a middle"""
    upright: float
    """cuts across time, relative to cuts across addresses: high makes short-lived, large buffers"""
    dropped: float
    shortened: float
    seed: int


RECIPES = (
    *(Recipe(num, 0.0, 1.0, 0.0, 0.0, seed) for seed, num in enumerate((180, 300, 450))),
    *(Recipe(num, 0.3, 1.0, 0.0, 0.0, seed) for seed, num in enumerate((180, 300, 450), 10)),
    *(Recipe(num, 0.2, 4.0, 0.0, 0.0, seed) for seed, num in enumerate((180, 300, 450), 20)),
    *(Recipe(num, 0.2, 1.0, 0.3, 0.0, seed) for seed, num in enumerate((180, 300, 450), 30)),
    *(Recipe(num, 0.2, 10.0, 0.3, 0.0, seed) for seed, num in enumerate((180, 300, 450), 40)),
    *(Recipe(num, 0.2, 1.0, 0.3, 0.3, seed) for seed, num in enumerate((180, 300, 450), 50)),
)


def instance(recipe: Recipe) -> tuple[Buffer, ...]:
    """The buffers of ``recipe``; their largest sum alive is ``CAPACITY``."""
    drawn = random.Random(recipe.seed)
    pieces = [(0, HORIZON, 0, CAPACITY)]
    while len(pieces) < recipe.num / (1 - recipe.dropped):
        place = max(
            drawn.sample(range(len(pieces)), min(4, len(pieces))), key=lambda index: _area(pieces[index])
        )
        pieces[place : place + 1] = _cut(pieces[place], recipe, drawn)
    worst = drawn.randrange(HORIZON)
    drawn.shuffle(pieces)
    pieces.sort(key=lambda piece: not piece[0] <= worst < piece[1])
    rows = []
    for a, b, c, d in pieces[: recipe.num]:
        if not a <= worst < b and b - a > 2 and drawn.random() < recipe.shortened:
            cut = drawn.randint(1, (b - a) // 2)
            a, b = (a + cut, b) if drawn.random() < 0.5 else (a, b - cut)
        rows.append((a, b, d - c))
    drawn.shuffle(rows)
    return tuple(Buffer(str(index), *row) for index, row in enumerate(rows))


Piece = tuple[int, int, int, int]
"""start, end, lowest and highest address"""


def _area(piece: Piece) -> int:
    return (piece[1] - piece[0]) * (piece[3] - piece[2])


def _cut(piece: Piece, recipe: Recipe, drawn: random.Random) -> list[Piece]:
    """Two parts, or five around a middle; the piece itself if it is too small."""
    a, b, c, d = piece
    width, height = b - a, (d - c) // GRAIN
    if drawn.random() < recipe.pinwheels and width >= 8 and height >= 8:
        left = a + drawn.randint(1, width // 2)
        right = drawn.randint(left + 1, b - 1)
        low = c + GRAIN * drawn.randint(1, height // 2)
        high = low + GRAIN * drawn.randint(1, (d - low) // GRAIN - 1)
        return [
            (a, right, c, low), (right, b, c, high), (left, b, high, d), (a, left, low, d), (left, right, low, high),
        ]  # fmt: skip
    across_time = width / HORIZON * recipe.upright
    if drawn.random() < across_time / (across_time + height * GRAIN / CAPACITY):
        middle = a + min(max(round(width * drawn.uniform(0.2, 0.8)), 1), width - 1)
        return [(a, middle, c, d), (middle, b, c, d)] if width > 1 else [piece]
    middle = c + GRAIN * min(max(round(height * drawn.uniform(0.2, 0.8)), 1), height - 1)
    return [(a, b, c, middle), (a, b, middle, d)] if height > 1 else [piece]


def run(session: Session) -> None:
    """All of it."""
    build()
    _hard(session)
    _traces(session)
    _layer_program(session)
    _whole_plan(session)


def _hard(session: Session) -> None:
    recipes = RECIPES[:2] if session.quick else RECIPES
    seeds = range(1 if session.quick else SEEDS)

    def measure() -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for recipe in recipes:
            buffers = instance(recipe)
            cut = sections(buffers)
            if cut.max_live != CAPACITY:
                raise RuntimeError(f"{recipe} has a load of {cut.max_live}, not {CAPACITY}")
            greedy = solve(buffers, time_limit_s=0.0)
            seconds = []
            for seed in seeds:
                plan = solve(buffers, capacity=CAPACITY, seed=seed, time_limit_s=LIMIT_S)
                solved = plan.peak is not None and not violations(
                    buffers, plan.offsets, peak=plan.peak, capacity=CAPACITY
                )
                seconds.append(plan.seconds if solved else float("nan"))
            session.say(f"hard {recipe}: {', '.join(f'{each:.2f}' for each in seconds)} s")
            rows.append(
                {
                    "hard": f"{recipe.seed}",
                    "buffers": len(buffers),
                    "sections": cut.num_sections,
                    "mean_load": float(cut.load.mean()) / CAPACITY,
                    "greedy_over_capacity": (greedy.peak or 0) / CAPACITY,
                    "median_s": statistics.median(seconds),
                    "worst_s": max(seconds, key=lambda each: (each != each, each)),
                    "solved": sum(each == each for each in seconds) / len(seconds),
                }
            )
        return rows

    rows = session.part("hard", measure)
    for row in rows:
        session.row(**row)
    worst = [float(row["worst_s"]) for row in rows]
    session.metric("hard_solved", statistics.fmean(float(row["solved"]) for row in rows), at_least=1.0)
    session.metric(
        "hard_total_s",
        sum(float(row["median_s"]) for row in rows),
        note=f"medians of {len(seeds)} seeds, summed",
    )
    session.metric("hard_worst_s", max(worst, key=lambda each: (each != each, each)), at_most=10.0)


def _traces(session: Session) -> None:
    def measure() -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for name, make in steps(quick=session.quick):
            start = time.perf_counter()
            buffers = make()
            traced = time.perf_counter()
            plan = solve(buffers, time_limit_s=60.0)
            if wrong := violations(buffers, plan.offsets, peak=plan.peak or 0):
                session.failed.append(f"{name}: {wrong[0]}")
            session.say(f"trace {name}: {len(buffers)} buffers, gap {plan.gap}")
            rows.append(
                {
                    "trace": name, "buffers": len(buffers), "trace_s": traced - start, "plan_s": plan.seconds,
                    "peak_gib": (plan.peak or 0) / GIB, "gap": plan.gap, "solver": plan.solver,
                }
            )  # fmt: skip
        return rows

    rows = session.part("traces", measure)
    for row in rows:
        session.row(**row)
    session.metric("trace_gap_max", max(float(row["gap"]) for row in rows), at_most=0.01)
    session.metric("trace_buffers_max", max(int(row["buffers"]) for row in rows))
    session.metric("trace_plan_worst_s", max(float(row["plan_s"]) for row in rows), at_most=60.0)


def _layer_program(session: Session) -> None:
    """MEMO's level 1 as a MIP, from nothing but the bounds: the seconds until it is proven."""
    shape = replace(PRESETS["7b"], d_ffn=4 * PRESETS["7b"].d_model)
    hidden = torch.empty(1, 131072, shape.d_model, dtype=torch.bfloat16, device="meta")
    found = trace_module(rank_layer(shape, kind="gpt", tp=1, cp=1), hidden)
    problems: dict[str, Sequence[Buffer]] = {
        "forward and backward": found.buffers(),
        "transients of forward": found.transients(backward=False),
        "transients of backward": found.transients(backward=True),
    }
    worst = 0.0
    for name, buffers in problems.items():
        cut = sections(buffers)
        start = time.perf_counter()
        program = milp.minimise(
            cut, upper_bound=int(cut.size.sum()), lower_bound=cut.max_live, time_limit_s=60.0
        )
        seconds = time.perf_counter() - start
        proven = program.peak == program.lower_bound
        worst = max(worst, seconds if proven else float("inf"))
        session.row(
            layer_mip=name, buffers=len(buffers), pairs=len(milp.pairs(cut)), seconds=seconds, proven=proven
        )
    session.metric("layer_mip_proved_s", worst, at_most=10.0, note="HiGHS, the slowest of the three")


def _whole_plan(session: Session) -> None:
    """65B at 1408K tokens on 64 GPUs, from the shape to the addresses."""
    shape = PRESETS["65b"]
    shape = replace(shape, d_ffn=4 * shape.d_model, vocab_size=50_257)
    request = MemoryRequest(
        shape=shape, kind="gpt", seq_len=1408 * 1024, tp=8, cp=8, pp=1, dp=1, micro_batches=1, gpus_per_node=8,
        peak_flops=312e12, flops=172e12, hbm_bytes=80 * GIB, host_bytes=2048 * GIB, link_bytes_s=11e9,
    )  # fmt: skip
    seconds = []
    for _ in range(1 if session.quick else 3):
        start = time.perf_counter()
        facts = layer_facts(shape, kind="gpt", tp=8, cp=8, seq_len=request.seq_len)
        plan = plan_memory(request, facts)
        seconds.append(time.perf_counter() - start)
    session.row(
        plan="65b, 1408K, 64 GPUs",
        seconds=statistics.median(seconds),
        skeletal_units=facts.layer_bytes / facts.hidden_bytes,
        buffers=len(plan.buffers),
        arena_gap=plan.arena.gap,
        policy_gap=plan.choice.gap,
        device_gib=plan.predicted["device_bytes"] / GIB,
        memo_alpha=plan.memo.alpha,
    )
    session.metric(
        "plan_65b_1408k_s", statistics.median(seconds), at_most=60.0, note="trace, policy and buffers"
    )
    session.metric("two_level_loss", plan.levels.loss, note="over the flat bound")
    _memos_numbers(session, request)


def _memos_numbers(session: Session, request: MemoryRequest) -> None:
    """7B at 1M tokens on 8 GPUs with 2 TiB: 16 units a layer, alpha 0.467."""
    shape = replace(PRESETS["7b"], d_ffn=4 * PRESETS["7b"].d_model)
    facts = layer_facts(shape, kind="gpt", tp=8, cp=1, seq_len=1 << 20)
    units = facts.layer_bytes / facts.hidden_bytes
    session.metric("skeletal_units", units, at_least=15.98, at_most=16.05, note="7B GPT layer, traced")
    memo = memo_of_the_paper(replace(request, shape=shape, seq_len=1 << 20, cp=1))
    session.metric("memo_alpha_7b_1m", memo.alpha or float("nan"), at_least=0.4665, at_most=0.4675)


if __name__ == "__main__":
    main("buffers", run)
