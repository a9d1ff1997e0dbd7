"""The door to the solvers: what they say is what they have proven."""

import math
import random

import pulp
import pytest

from distrain.core.errors import InfeasibleError, UndecidedError
from distrain.planners.solve import Solver, solve

SOLVERS: tuple[Solver, ...] = ("highs", "cbc")


def knapsack(num_items: int, *, sense: int = pulp.LpMaximize, constant: float = 0.0) -> pulp.LpProblem:
    """Twenty rows over random-looking items: nothing that a solver finishes at once if there are many."""
    program = pulp.LpProblem("knapsack", sense)
    items = [program.add_variable(f"x{index}", 0, 1, cat="Integer") for index in range(num_items)]
    sign = 1 if sense == pulp.LpMaximize else -1
    program += (
        sign * pulp.lpSum((17 + index * 7919 % 83) * item for index, item in enumerate(items)) + constant
    )
    for row in range(20):
        program += pulp.lpSum(
            (11 + (index + 3) * (row + 5) * 104729 % 97) * item for index, item in enumerate(items)
        ) <= (20 * num_items)
    return program


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sense", [pulp.LpMinimize, pulp.LpMaximize])
def test_a_program_that_is_finished_is_optimal_and_its_bound_is_its_objective(
    solver: Solver, sense: int
) -> None:
    found = solve(knapsack(12, sense=sense, constant=5.0), solver=solver)
    assert found.status == "optimal"
    assert found.bound == pytest.approx(found.objective)
    assert found.gap == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sense", [pulp.LpMinimize, pulp.LpMaximize])
def test_both_solvers_find_the_same(sense: int) -> None:
    one, other = (solve(knapsack(15, sense=sense), solver=solver).objective for solver in SOLVERS)
    assert one == pytest.approx(other)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_time_limit_is_not_optimal(solver: Solver) -> None:
    found = solve(knapsack(80), time_limit_s=0.5, solver=solver)
    assert found.status == "feasible"
    assert found.bound > found.objective
    assert found.gap > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_has_no_solution_is_an_error_of_its_own(solver: Solver) -> None:
    program = pulp.LpProblem("none", pulp.LpMinimize)
    x = program.add_variable("x", 0, 10, cat="Integer")
    program += x
    program += 2 * x == 3
    with pytest.raises(InfeasibleError, match="none has no solution"):
        solve(program, solver=solver)


def test_no_solution_in_time_is_undecided() -> None:
    with pytest.raises(UndecidedError, match="not solved in time"):
        solve(market_split(), time_limit_s=0.05)


def market_split() -> pulp.LpProblem:
    """Equalities over big numbers: solvers find no solution in any short time."""
    program = pulp.LpProblem("split", pulp.LpMinimize)
    shares = [program.add_variable(f"x{index}", 0, 1, cat="Integer") for index in range(50)]
    program += 0 * shares[0]
    draw = random.Random(1)
    for _ in range(6):
        weights = [draw.randrange(100) for _ in range(50)]
        program += (
            pulp.lpSum(weight * share for weight, share in zip(weights, shares, strict=True))
            == sum(weights) // 2
        )
    return program


def test_an_objective_without_limit_is_refused() -> None:
    program = pulp.LpProblem("open", pulp.LpMaximize)
    x = program.add_variable("x", 0)
    program += x
    with pytest.raises(ValueError, match="unbounded"):
        solve(program)


def test_a_warm_start_is_where_the_search_begins() -> None:
    program = knapsack(80)
    solve(program, time_limit_s=0.5)
    values = sum(variable.value() * weight for variable, weight in program.objective.items())
    again = solve(program, time_limit_s=0.1, warm_start=True)
    assert again.objective >= values - 1e-6


def test_a_program_without_integers_has_its_optimum_as_bound() -> None:
    program = pulp.LpProblem("linear", pulp.LpMinimize)
    x, y = program.add_variable("x", 0), program.add_variable("y", 0)
    program += 2 * x + 3 * y + 1
    program += x + y >= 4
    found = solve(program)
    assert (found.status, found.objective, found.bound) == ("optimal", 9.0, 9.0)
    assert not math.isinf(found.seconds)
