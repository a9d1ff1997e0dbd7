"""Arms one process with its part of a fault plan: one call, made by a trainer or a keeper when it starts.

``DISTRAIN_FAULTS`` names the plan, ``DISTRAIN_FAULTS_TRUTH`` the folder for what really happened (by default the
plan's name with ``.truth`` instead of its ending). Without the first nothing happens, and nothing is imported.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from distrain.core.errors import Problem, raise_if

from .control import Control
from .engines import installer
from .kinds import KINDS, Engine, Victim
from .live import Here, Live
from .plan import IN_COLLECTIVE, Fault, FaultPlan
from .points import Points
from .truth import TruthLog, had_their_turn, read_truth

PLAN = "DISTRAIN_FAULTS"
TRUTH = "DISTRAIN_FAULTS_TRUTH"


class Armed:
    """The faults of this process, until ``close``."""

    def __init__(self, faults: Sequence[Live], stack: ExitStack) -> None:
        self.faults = faults
        self._stack = stack

    def close(self) -> None:
        """Disarm what has not fired."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def arm(
    *,
    role: str = "trainer",
    node: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Armed:
    """Arm this process; ``role`` is trainer or keeper, rank and ``node`` are those of torchrun's variables.

    A loop that does not pass the points of ``engines.steps`` can be followed by its optimizer (``script``).

    Raises:
        ConfigError: the plan cannot be read, or holds a fault that can only come from outside and nobody is there.
    """
    if not environ.get(PLAN):
        return Armed((), ExitStack())
    path = Path(environ[PLAN]).absolute()
    plan = FaultPlan.load(path)
    folder = Path(environ.get(TRUTH) or path.with_suffix(".truth")).absolute()
    here = _here(plan, folder, role, node, environ)
    with ExitStack() as stack:
        stack.callback(here.truth.close)
        had = had_their_turn(read_truth(folder))
        faults = [
            Live(number, fault, here)
            for number, fault in enumerate(plan.faults)
            if _is_mine(fault, here)
            and plan.is_drawn(number, here.victim(fault.kind))
            and (number, here.victim(fault.kind)) not in had
        ]
        hello = {"role": role, "rank": here.rank, "node": here.node}
        here.control = Control.connect(folder, hello=hello)
        if here.control:
            stack.callback(here.control.close)
        raise_if(list(_refused(faults, here)))
        points = Points()
        stack.callback(points.close)
        if role == "trainer":
            points.on("train.step", lambda context: setattr(here, "step", context["step"]))
        for engine in dict.fromkeys(live.spec.engine for live in faults):
            install = installer(engine)
            install([live for live in faults if live.spec.engine is engine], here, points, stack)
        if any(live.fault.target.where == IN_COLLECTIVE for live in faults):
            from .engines.intercept import watch_collectives

            watch_collectives(stack)
        return Armed(faults, stack.pop_all())


def _here(plan: FaultPlan, folder: Path, role: str, node: int | None, environ: Mapping[str, str]) -> Here:
    rank = int(environ.get("RANK", 0)) if role == "trainer" else -1
    node = int(environ.get("GROUP_RANK", 0)) if node is None else node
    return Here(
        role=role,
        rank=rank,
        local_rank=int(environ.get("LOCAL_RANK", 0)),
        node=node,
        plan=plan,
        truth=TruthLog(folder, who=f"rank-{rank}" if role == "trainer" else f"keeper-{node}"),
        folder=folder,
    )


def _is_mine(fault: Fault, here: Here) -> bool:
    """Whether this process is the fault's victim or, where the victim cannot know its moment, the one to tell."""
    target, victim = fault.target, KINDS[fault.kind].victim
    if victim is Victim.WRITER:
        if here.role != (target.role or "keeper"):
            return False
        return target.node in (None, here.node) and (not target.ranks or here.rank in target.ranks)
    if here.role != "trainer":
        return False
    if victim is Victim.RANK:
        return here.rank in target.ranks or target.node == here.node
    node = target.link[0] if target.link else target.node or 0
    return here.local_rank == 0 and here.node == node


def _refused(faults: Sequence[Live], here: Here) -> Iterator[Problem]:
    for live in faults:
        name = f"faults[{live.number}], {live.fault.kind},"
        if live.spec.refused:
            yield Problem(f"{name} cannot be injected yet", live.spec.refused)
        elif live.spec.engine is Engine.OUTSIDE and here.control is None:
            hint = "start the job inside `with Injector(plan, folder) as injector`, with its variables"
            yield Problem(
                f"{name} comes from outside, and nobody is there", f"no injector in {here.folder}", hint=hint
            )
