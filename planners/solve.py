"""One door to the solvers: a PuLP program goes in, what was found and what is proven comes out.

PuLP calls a program that ran out of time "Optimal" as long as it has some solution. Here the word is the solver's own:

    ``optimal``    the bound meets the objective
    ``feasible``   there is a solution, and the bound says how far from the best it can be
    exceptions     ``InfeasibleError``: proven that there is none; ``UndecidedError``: none found in time

HiGHS is the default; CBC, which PuLP brings, is for comparisons.
"""

import math
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import highspy
import pulp

from distrain.core.errors import InfeasibleError, UndecidedError

Solver = Literal["highs", "cbc"]
Status = Literal["optimal", "feasible"]

_CLOSED = 1e-6  # relative distance of bound and objective at which nothing better is worth looking for
_CBC_BOUND = re.compile(r"^Lower bound:\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Solution:
    """What a solver says of a program whose variables now hold the values it found."""

    status: Status
    objective: float
    bound: float
    """no solution is better; infinite where the solver proved nothing"""
    seconds: float

    @property
    def gap(self) -> float:
        """Distance of objective and bound, relative to the objective."""
        return abs(self.objective - self.bound) / max(abs(self.objective), 1e-12)


def solve(
    program: pulp.LpProblem,
    *,
    time_limit_s: float | None = None,
    gap: float = 0.0,
    solver: Solver = "highs",
    warm_start: bool = False,
) -> Solution:
    """Solve ``program`` on one thread, until bound and objective are within ``gap`` (relative) or time is up.

    With ``warm_start`` the search begins at the values that the variables have.

    Raises:
        InfeasibleError: it is proven that there is no solution.
        UndecidedError: no solution was found in the time given.
        ValueError: the objective has no limit, or the solver could make nothing of the program.
    """
    run = _highs if solver == "highs" else _cbc
    start = time.perf_counter()
    found, word, bound = run(program, time_limit_s, gap, warm_start)
    seconds = time.perf_counter() - start
    if word == "infeasible":
        raise InfeasibleError(f"the program {program.name} has no solution", got=f"{solver}: infeasible")
    if word in ("unbounded", "error"):
        raise ValueError(f"{solver} on {program.name}: {word}")
    if not found:
        raise UndecidedError(
            f"the program {program.name} was not solved in time",
            got=f"{solver}: no solution in {seconds:.1f} s",
            hint="a longer time limit",
        )
    objective = float(pulp.value(program.objective) or 0.0)
    closed = abs(objective - bound) <= _CLOSED * max(1.0, abs(objective))
    return Solution("optimal" if closed else "feasible", objective, bound, seconds)


class _Highs(pulp.HiGHS):  # type: ignore[misc]  # PuLP is untyped
    """PuLP's HiGHS, which begins at the values of the variables if it is told to."""

    warm: bool = False

    def callSolver(self, lp: Any) -> None:
        """Run it."""
        if self.warm:
            start = highspy.HighsSolution()
            start.col_value = [float(variable.value() or 0.0) for variable in lp.variables()]
            lp.solverModel.setSolution(start)
        super().callSolver(lp)


def _highs(
    program: pulp.LpProblem, time_limit_s: float | None, gap: float, warm_start: bool
) -> tuple[bool, str, float]:
    """Whether there is a solution, what the solver says, and its bound."""
    solver = _Highs(msg=False, threads=1, gapRel=gap, gapAbs=0.0 if gap else 1e-9, timeLimit=time_limit_s)
    solver.warm = warm_start
    program.solve(solver)
    model = program.solverModel
    status, info = model.getModelStatus(), model.getInfo()
    statuses = highspy.HighsModelStatus
    word = {
        statuses.kOptimal: "optimal",
        statuses.kInfeasible: "infeasible",
        statuses.kUnbounded: "unbounded",
        statuses.kUnboundedOrInfeasible: "unbounded",
        statuses.kTimeLimit: "stopped",
        statuses.kInterrupt: "stopped",
    }.get(status, "error")
    if status == statuses.kModelEmpty:
        word = "optimal"
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    sign = -1.0 if program.sense == pulp.LpMaximize else 1.0  # PuLP hands HiGHS a minimisation
    constant = float(program.objective.constant)
    if program.isMIP():
        bound = constant + sign * float(info.mip_dual_bound)
    elif word == "optimal":
        bound = float(pulp.value(program.objective) or 0.0)
    else:
        bound = -sign * math.inf
    return found or status == statuses.kModelEmpty, word, bound


def _cbc(
    program: pulp.LpProblem, time_limit_s: float | None, gap: float, warm_start: bool
) -> tuple[bool, str, float]:
    """As ``_highs``; CBC is a process of its own, and prints its bound only if it stops before it is done."""
    handle, name = tempfile.mkstemp(suffix=".log")
    os.close(handle)
    log = Path(name)
    try:
        program.solve(
            pulp.COIN_CMD(
                path=pulp.PULP_CBC_CMD.pulp_cbc_path,
                msg=False,
                threads=1,
                gapRel=gap,
                gapAbs=0.0,
                timeLimit=time_limit_s,
                warmStart=warm_start,
                logPath=str(log),
            )
        )
        printed = _CBC_BOUND.findall(log.read_text())
    finally:
        log.unlink()
    found = program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    sign = -1.0 if program.sense == pulp.LpMaximize else 1.0
    word = {
        pulp.LpStatusOptimal: "optimal" if program.sol_status == pulp.LpSolutionOptimal else "stopped",
        pulp.LpStatusInfeasible: "infeasible",
        pulp.LpStatusUnbounded: "unbounded",
    }.get(program.status, "stopped")
    bound = -sign * math.inf
    if printed:
        bound = sign * float(printed[-1]) + float(program.objective.constant)
    elif word == "optimal" and gap == 0.0:
        bound = float(pulp.value(program.objective) or 0.0)
    return found, word, bound
