"""Decides, once a layer has run, what becomes of each of its units, and does it.

The plan says how many tokens are kept, swapped and recomputed; the recipe says which units that can be done to. What
can neither be cut nor made again goes where the plan puts whole tensors. If the host has no room left, a unit stays on
the device: that costs memory, never correctness, and is counted.

A recipe is what the tape saw, and not all can be seen. So each is tried once, on the layer's own data, before anything
is let go for its sake; but not if it holds collectives of ranks that may not try it at the same time.
"""

import torch
from torch import Tensor

from distrain.planners.activation_plan import TOKENS, LayerPlan, Split

from .frame import Frame, Remake
from .ledger import Ledger
from .locality import equal, like
from .program import Program
from .recipe import Recipe, write
from .storage import ALIGNMENT, VersionGuard
from .units import Unit

SMALL_BYTES = 1024
"""units that are not worth moving"""


@torch.no_grad()
def settle(frame: Frame, plan: LayerPlan, *, num_tokens: int) -> None:
    """Carry out ``plan``, which is for ``num_tokens``, on the units of ``frame``."""
    program = frame.tape.program()
    for unit in frame.units.values():
        unit.window = program.windows[unit.memory.base]
    readable = frame.tape.readable
    frame.engine.ledger.num_unreadable += not readable
    remake = None
    if readable and frame.units and (plan.recomputes or len(set(plan.splits)) > 1):
        remake = _remake(frame, plan, program, num_tokens)
    splits = {id(unit): _split(unit, plan, remake, frame.engine.ledger) for unit in frame.units.values()}
    if plan.recomputes:
        frame.remake = remake
    _move(frame, splits)
    frame.close()


def _remake(frame: Frame, plan: LayerPlan, program: Program, num_tokens: int) -> Remake:
    """How what is let go will be made again; makes units of the inputs that it starts from."""
    tape, engine = frame.tape, frame.engine
    saved = {
        unit.memory.base
        for unit in frame.units.values()
        if unit.memory.is_new and not unit.memory.spoiled and unit.window.covers(unit.num_bytes)
    }
    start = num_tokens - max(split.recompute for split in plan.splits)
    everything = plan.attention.recompute > 0
    tried = start if 0 < start < num_tokens else num_tokens // 2 // TOKENS * TOKENS or num_tokens // 2
    spoiled = tape.spoiled_values() | frame.freed(program)

    def write_it() -> Recipe:
        prober = None if everything else engine.prober(num_tokens=num_tokens, start=tried)
        return write(
            program,
            saved,
            spoiled=spoiled,
            never=tape.cores,
            trusted=tape.trusted,
            prober=prober,
            entire=start == 0,
        )

    same = (
        program,
        frozenset(saved),
        frozenset(tape.cores),
        frozenset(tape.trusted),
        num_tokens,
        start,
        everything,
    )
    while True:
        known = engine.known((*same, frozenset(spoiled)), write_it)
        remake = _from(frame, known.recipe, program, num_tokens=num_tokens, start=start)
        wrong = known.wrong.get(frame.index)
        if wrong is None:
            may_try = engine.may_try(known.recipe)
            wrong = known.wrong[frame.index] = _wrong(frame, remake) if may_try else frozenset()
        if not wrong:
            return remake
        spoiled |= wrong


def _from(frame: Frame, recipe: Recipe, program: Program, *, num_tokens: int, start: int) -> Remake:
    outside = recipe.outside.items()
    inputs = {value: frame.add_input(origin.key) for value, origin in outside if origin.kind == "input"}
    return Remake(
        program=program,
        recipe=recipe,
        start=start,
        num_tokens=num_tokens,
        seeds=tuple(frame.tape.seeds),
        inputs=inputs,
        guards={value: VersionGuard(frame.given(origin)) for value, origin in outside},
    )


def _wrong(frame: Frame, remake: Remake) -> frozenset[int]:
    """Saved values that do not come out as they were: somebody changed, or drew, what no mode sees.

    Tried once for each layer and form of it, while what was saved is still there: a kernel may write to memory that it
    was given without telling torch, and do so in one of two layers that look the same.
    """
    units = {unit.memory.base: unit for unit in frame.units.values()}
    same = like if frame.tape.trusted else equal
    found: dict[int, bool] = {}

    def compare(value: int, result: Tensor) -> None:
        truth, rows = units[value].whole(), remake.recipe.rows[value]
        if rows is not None and result.shape != truth.shape:
            truth = rows.take(truth, remake.start, remake.num_tokens)
        found[value] = same(result, truth)

    frame.replay(remake, compare)
    return frozenset(value for value in sorted(found) if not frame.engine.all_agree(found[value]))


def _split(unit: Unit, plan: LayerPlan, remake: Remake | None, ledger: Ledger) -> Split:
    """What becomes of a unit, and the place of its tokens if it is cut by them."""
    everything = Split(keep=plan.num_tokens)
    if unit.num_bytes <= SMALL_BYTES:
        return everything
    if not unit.memory.is_new:
        return plan.input
    if remake is None or unit.memory.base not in remake.recipe.rows:
        ledger.num_left_whole += plan.attention.recompute > 0
        ledger.not_by_token_bytes += unit.num_bytes * plan.recomputes
        return everything if plan.attention.recompute else plan.attention
    after = unit.memory.base > remake.recipe.attention
    split = plan.after_attention if after else plan.before_attention
    unit.rows = remake.recipe.rows[unit.memory.base]
    # What is made as a whole, such as random numbers, is made anyway.
    return Split(recompute=plan.num_tokens) if unit.rows is None and split.recompute else split


def _move(frame: Frame, splits: dict[int, Split]) -> None:
    """Bring every unit to its place, all copies to the host in one go."""
    copies: list[tuple[Tensor, Tensor]] = []
    gone: list[Unit] = []
    for unit in frame.units.values():
        first, end, total = _cuts(unit, splits[id(unit)])
        if first >= total:
            frame.engine.ledger.kept_bytes += unit.num_bytes
            continue
        if end > first:
            source = unit.part(first, end)
            unit.block = frame.engine.pool.take(source.numel() * source.element_size())
            if unit.block is None:
                frame.engine.ledger.kept_bytes += unit.num_bytes
                unit.rows = None
                continue
            unit.sent_from, unit.sent_to = first, end
            copies.append((source, unit.sent()))
        unit.sent_from, unit.sent_to, unit.stays = first, end, False
        if first:
            unit.kept = unit.part(0, first).clone()
        gone.append(unit)
    if copies:
        frame.sent = frame.engine.traffic.send_out(copies)
    for unit in gone:
        unit.storage = None
        frame.count_gone(unit)


def _cuts(unit: Unit, split: Split) -> tuple[int, int, int]:
    """End of what is kept, end of what is sent out, end of all: in tokens, or in bytes if the unit has no tokens."""
    if unit.rows is not None:
        return split.keep, split.keep + split.swap, split.num_tokens
    total, n = unit.num_bytes, split.num_tokens
    cuts = (total * split.keep // n, total * (split.keep + split.swap) // n)
    first, end = (cut if cut == total else cut // ALIGNMENT * ALIGNMENT for cut in cuts)
    return first, end, total
