"""``distrain plan buffers``: addresses for the buffers of a CSV file, and a proof of how good they are."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from distrain.core.errors import ConfigError, InfeasibleError, Problem, UndecidedError, raise_if
from distrain.planners.buffers.result import BufferPlan, Status


def buffers(
    table: Annotated[
        Path, typer.Argument(help="CSV: id,lower,upper,size (half-open lifetimes).", metavar="IN")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write IN with a column offset.", metavar="OUT")
    ] = None,
    capacity: Annotated[
        int | None,
        typer.Option(min=0, help="Stop at the first plan that fits under this.", show_default="lowest peak"),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=0.0, help="Seconds to search.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the search; the answer is valid at any.")] = 0,
    align: Annotated[
        int, typer.Option(min=1, help="Offsets are multiples of this; sizes are rounded up.")
    ] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan here.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Give every buffer an address so that none shares a byte with another that lives at the same time.

    Without --capacity the highest byte is made as low as possible. Exit codes: 0 planned, 4 proven that nothing fits
    under the capacity, 5 not decided in the time given.

    \b
    Examples:
      distrain plan buffers trace.csv -o planned.csv
      distrain plan buffers trace.csv --capacity 1048576 --time-limit 10 -o planned.csv
      distrain plan buffers trace.csv --json --plot plan.svg
    """
    from distrain.planners import drawing
    from distrain.planners.buffers import problem, solve
    from distrain.planners.buffers import table as csv
    from distrain.planners.buffers.engine import engine

    problems = list(_unwritable(output))
    if plot is not None:
        problems += drawing.check(plot)
    raise_if(problems)
    given = csv.read(table)
    console = Console(stderr=True)
    with console.status(f"planning {len(given)} buffers", spinner="line"):
        needed = problem.aligned(given, alignment=align)
        plan = solve(needed, capacity=capacity, time_limit_s=time_limit, seed=seed, engine=engine(build=True))
    if plan.peak is not None:
        try:
            if output is not None:
                csv.write(output, given, plan.offsets)
        except OSError as error:
            raise ConfigError("this cannot be written", got=f"{error.filename}: {error.strerror}") from None
        if plot is not None:
            from distrain.planners.buffers.address_map import address_map

            title = f"{len(given)} buffers, peak {plan.peak}, {plan.status}"
            drawing.draw(plot, [address_map(needed, plan.offsets, lower_bound=plan.lower_bound, title=title)])
    if as_json:
        print(json.dumps({"buffers": len(given), "capacity": capacity, **plan.to_dict()}, indent=2))
    elif plan.peak is not None:
        _show(plan, len(given))
    _judge(plan, capacity)


def _unwritable(path: Path | None) -> Iterator[Problem]:
    """Why a file cannot be written, as far as can be told before a long search."""
    if path is None:
        return
    place = path if path.exists() else path.absolute().parent
    if path.is_dir() or not os.access(place, os.W_OK):
        yield Problem("this cannot be written", str(path), "a file in a folder that is there")


def _show(plan: BufferPlan, num_buffers: int) -> None:
    print(f"{num_buffers} buffers: peak {plan.peak}, lower bound {plan.lower_bound}, gap {plan.gap:.2%}")
    print(f"{plan.status} by {plan.solver} in {plan.seconds:.2f} s; {plan.proof}")
    for note in plan.notes:
        print(note)


def _judge(plan: BufferPlan, capacity: int | None) -> None:
    """What a plan that is none ends with."""
    if plan.status is Status.INFEASIBLE:
        raise InfeasibleError(
            "the buffers do not fit",
            got=f"capacity {capacity}; {plan.proof}",
            allowed=f"{plan.lower_bound} and up may be possible",
        )
    if plan.status is Status.UNDECIDED:
        raise UndecidedError(
            "it is not known whether the buffers fit",
            got="; ".join((f"capacity {capacity}", plan.proof, *plan.notes)),
            hint="a longer --time-limit, or a higher --capacity",
        )
