"""How the saved tensors of a layer are made again from what was swapped or kept whole.

Going through a program in order, each value gets a standing::

    WHOLE    it is at hand: the layer's input, or a saved tensor that mixes tokens (attention) and so was put by whole
    FREE     it follows from parameters, constants and drawn numbers alone, and is made whole
    Rows     it follows token by token from values at hand, and these are the places of its tokens
    LOST     none of these: it is not saved, and what needs it is put by whole

What was only reserved (``empty_like``) counts as lost to all who read it but collectives: between the two somebody
filled it whom no mode sees, such as a Triton kernel.

A recipe is the part of the program that leads to the saved tensors, and stops at what is at hand. It is shorter than
the layer: what made tensors that nobody saved is left out, the last matrix product among them.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum

from .locality import Local, Prober
from .program import Node, Origin, Program, Ref
from .rows import Rows

EMPTIES = frozenset(
    ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
)
"""operators that reserve memory and leave in it what was there"""


class Standing(Enum):
    """Of a value that is not made token by token."""

    WHOLE = "whole"
    FREE = "free"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Step:
    """One operator of a recipe."""

    node: Node
    local: Local | None
    """None: on all tokens"""
    done_with: tuple[int, ...]
    """values that no later step needs"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What to do, and what it makes."""

    steps: tuple[Step, ...]
    rows: dict[int, Rows | None]
    """saved values that it makes; None: made whole, not by token"""
    outside: dict[int, Origin]
    """values that it starts from and that the layer did not make: inputs, parameters, constants"""
    attention: int
    """the first saved value that it cannot make: those before it are before attention"""


def write(
    program: Program,
    saved: Set[int],
    *,
    spoiled: Set[int],
    never: Set[int],
    trusted: Set[int],
    prober: Prober | None,
    entire: bool,
) -> Recipe:
    """The recipe for the values ``saved``, or as many of them as can be made.

    Nodes of ``never`` are not done again, those of ``trusted`` even if they then round differently; values of
    ``spoiled`` are not used. Without a prober everything is made from
    the inputs, attention and all. ``entire``: on all tokens, though only what works token by token.
    """
    standing: dict[int, Standing | Rows] = dict.fromkeys(spoiled, Standing.LOST)
    for value, origin in program.origins:
        standing.setdefault(value, _OF_ORIGIN.get(origin.kind, Standing.FREE))
    blank = {out for node in program.nodes if node.name in EMPTIES for out in node.outs}
    plans: dict[int, Local] = {}
    for number in _ancestors(program, saved):
        node = program.nodes[number]
        free, local = False, None
        if number not in never:
            free, local = _done_again(
                node, program, standing, prober, blank=blank, exact=number not in trusted
            )
        if local is not None:
            plans[number] = local
        for place, out in enumerate(node.outs):
            if out is None or out in standing:
                continue
            rows = None if local is None else local.outs[place]
            if rows is not None:
                standing[out] = rows
            elif free:
                standing[out] = Standing.FREE
            else:
                standing[out] = Standing.WHOLE if out in saved else Standing.LOST
    made = {value: _rows(standing[value]) for value in saved if standing[value] not in _NOT_MADE}
    if entire:
        plans, made = {}, dict.fromkeys(made)
    at_hand = {value for value, each in standing.items() if each is Standing.WHOLE}
    attention = min(at_hand & saved, default=-1)
    steps = _steps(program, made, at_hand=at_hand, plans=plans)
    read = {ref.value for step in steps for ref in _read(step.node)}
    outside = {value: origin for value, origin in program.origins if value in read}
    return Recipe(steps, made, outside, attention)


_OF_ORIGIN = {"input": Standing.WHOLE, "unknown": Standing.LOST}
_NOT_MADE = (Standing.WHOLE, Standing.LOST)


def _rows(standing: Standing | Rows) -> Rows | None:
    return standing if isinstance(standing, Rows) else None


def _done_again(
    node: Node,
    program: Program,
    standing: Mapping[int, Standing | Rows],
    prober: Prober | None,
    *,
    blank: Set[int | None],
    exact: bool,
) -> tuple[bool, Local | None]:
    """Whether ``node`` is done on all tokens, or how on some of them; neither if its arguments are lost."""
    known = {ref.value: standing[ref.value] for ref in _read(node)}
    if Standing.LOST in known.values() or (not node.is_call and not blank.isdisjoint(known)):
        return False, None
    if node.blank or prober is None or all(each is Standing.FREE for each in known.values()):
        return True, None
    if node.seed is not None:  # other tokens would draw other numbers
        return False, None
    places = {value: _rows(each) for value, each in known.items()}
    return False, prober.local(node, program.windows, places, exact=exact)


def _read(node: Node) -> Sequence[Ref]:
    """The arguments whose content counts."""
    return node.refs[1:] if node.blank else node.refs


def _ancestors(program: Program, saved: Set[int]) -> list[int]:
    """Nodes that lead to ``saved``, in order."""
    wanted, found = set(saved), []
    for number in range(len(program.nodes) - 1, -1, -1):
        node = program.nodes[number]
        if any(out in wanted for out in node.outs):
            found.append(number)
            wanted.update(ref.value for ref in _read(node))
    return found[::-1]


def _steps(
    program: Program, made: dict[int, Rows | None], *, at_hand: Set[int], plans: Mapping[int, Local]
) -> tuple[Step, ...]:
    """What of the program leads from ``at_hand`` to ``made``."""
    wanted, steps = set(made), []
    seen: set[int] = set(made)
    for number in range(len(program.nodes) - 1, -1, -1):
        node = program.nodes[number]
        if not any(out in wanted for out in node.outs if out is not None and out not in at_hand):
            continue
        used = {ref.value for ref in _read(node)} - at_hand
        unused = {out for out in node.outs if out is not None and out not in seen}
        steps.append(Step(node, plans.get(number), tuple((used - seen) | unused)))
        seen |= used | unused
        wanted |= used
    return tuple(steps[::-1])
