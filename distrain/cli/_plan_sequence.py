"""``distrain plan sequence``: the groups of every micro-batch for a batch of sequences."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from distrain.core.errors import ConfigError, Problem, raise_if

if TYPE_CHECKING:
    from distrain.planners.sequence import StepPlan

Input = TypeVar("Input")

CERTIFY_S = 29.0  # what is solved when time is up may take some more
_SHOWN = 5
_LENGTH = re.compile("-?[0-9]{1,300}")  # what a float can hold


def sequence(
    lengths: Annotated[
        Path, typer.Option(help="Tokens of each sequence, one number a line.", metavar="FILE")
    ],
    gpus: Annotated[int, typer.Option(help="Devices of the data plane.", metavar="N")],
    cost: Annotated[str, typer.Option(help="7b, 13b, 30b, or a TOML file.", metavar="FILE|PRESET")],
    time_limit: Annotated[
        float | None,
        typer.Option(min=0.0, help="Seconds to search.", metavar="S", show_default="0.02 to 2, by size"),
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify", help="Prove a stronger bound: at most 30 s more.")
    ] = False,
    schedule: Annotated[
        Literal["lock-step", "asynchronous", "auto"],
        typer.Option(help="asynchronous: micro-batches end without a barrier, where sharding allows."),
    ] = "lock-step",
    solver: Annotated[
        Literal["native", "python", "milp"], typer.Option(help="milp: FlexSP's program, for comparison.")
    ] = "native",
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan.", metavar="PLAN.json")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan (SVG, PNG, PDF).", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Plan groups of the right size for every sequence of a step, with a bound on what any plan could reach.

    \b
    Examples:
      distrain plan sequence --lengths lengths.txt --gpus 64 --cost 7b
      distrain plan sequence --lengths lengths.txt --gpus 64 --cost 7b --certify -o plan.json
      distrain plan sequence --lengths lengths.txt --gpus 24 --cost cost.toml --time-limit 1 --plot plan.svg
      distrain plan sequence --lengths lengths.txt --gpus 64 --cost 7b --json | jq .gap
    """
    from distrain.planners import drawing
    from distrain.planners.sequence import load_cost, plan_step
    from distrain.planners.sequence.problem import problems as batch_problems

    problems: list[Problem] = []
    model = _tried(lambda: load_cost(cost), problems)
    numbers = _tried(lambda: _read(lengths), problems)
    problems += batch_problems([1] if numbers is None else numbers, num_slots=gpus)
    problems += _unwritable(output)
    problems += drawing.check(plot) if plot is not None else []
    if problems or model is None or numbers is None:
        raise ConfigError.of(problems)
    console = Console(stderr=True)
    with console.status("searching for a better bound ..." if certify else "planning ..."):
        found = plan_step(
            numbers,
            num_slots=gpus,
            cost=model,
            time_limit_s=time_limit,
            certify_s=CERTIFY_S if certify else 0.0,
            seed=seed,
            schedule=schedule,
            solver=solver,
        )
    if output is not None:
        try:
            found.save(output)
        except OSError as error:
            raise ConfigError("this cannot be written", got=f"{output}: {error.strerror}") from None
    if plot is not None:
        from distrain.planners.sequence.plots import slots_over_time

        drawing.draw(plot, [slots_over_time(found)])
    written = [path for path in (output, plot) if path is not None]
    print(found.to_json(), end="") if as_json else _show(found, numbers, written)


def _tried(read: Callable[[], Input], problems: list[Problem]) -> Input | None:
    """What ``read`` returns; None if it is refused, with the reasons added to ``problems``."""
    try:
        return read()
    except ConfigError as error:
        problems += error.problems
        return None


def _unwritable(path: Path | None) -> Iterator[Problem]:
    """Why a file cannot be written, as far as can be told before planning."""
    if path is None:
        return
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # such as /dev/stdout
        if not os.access(path, os.W_OK):
            yield Problem("this cannot be written", str(path), "what may be written to")
        return
    folder = Path(os.path.realpath(path)).parent
    while not os.path.exists(
        folder
    ):  # unlike a Path, takes a name that is too long for one that is not there
        folder = folder.parent
    if os.path.isdir(path) or not folder.is_dir() or not os.access(folder, os.W_OK):
        yield Problem("this cannot be written", str(path), "a file in a folder that is there, or can be made")


def _read(path: Path) -> list[int]:
    """One whole number a line; empty lines at the end do not count."""
    try:
        lines = path.read_text("utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError("the lengths cannot be read", got=f"{path}: {why}") from None
    wrong = [(at, line) for at, line in enumerate(lines, 1) if not _LENGTH.fullmatch(line.strip())]
    more = f" and {len(wrong) - _SHOWN} more lines" if len(wrong) > _SHOWN else ""
    shown = ", ".join(f"{line.strip()[:40]!r} (line {at})" for at, line in wrong[:_SHOWN]) + more
    raise_if(
        [Problem(f"{path} has lines that are no lengths", shown, "one whole number a line")] if wrong else []
    )
    return [int(line) for line in lines]


def _show(plan: "StepPlan", lengths: Sequence[int], written: Sequence[Path]) -> None:
    table = Table("micro-batch", "ms", "groups", "sequences", "tokens", "busy", box=None, header_style="bold")
    for index, groups in enumerate(plan.microbatches):
        longest_ms = max(group.estimated_ms for group in groups)
        members = [sequence for group in groups for sequence in group.sequences]
        busy = sum(group.degree * group.estimated_ms for group in groups) / (plan.num_slots * longest_ms or 1)
        table.add_row(
            str(index),
            f"{longest_ms:,.1f}",
            _degrees(group.degree for group in groups),
            f"{len(members):,}",
            f"{sum(lengths[member] for member in members):,}",
            f"{busy:.0%}",
        )
    console = Console(soft_wrap=True)
    console.print(table)
    for line in ("", *_summary(plan), *map(str, written)):
        console.print(line, markup=False, highlight=False)


def _degrees(degrees: Iterator[int]) -> str:
    """``2x16 4x8``: how many groups of which degree."""
    counts = sorted(Counter(degrees).items(), reverse=True)
    return " ".join(f"{count}x{degree}" for degree, count in counts)


def _summary(plan: "StepPlan") -> Iterator[str]:
    num = sum(len(group.sequences) for groups in plan.microbatches for group in groups)
    yield (
        f"{num:,} sequences on {plan.num_slots:,} devices, {plan.schedule}: "
        f"{plan.estimated_ms:,.1f} ms, planned in {1e3 * plan.seconds:,.0f} ms"
    )
    yield f"no plan takes less than {plan.lower_bound_ms:,.1f} ms: gap {plan.gap:.2%}, {plan.status}"
    for name, ms in plan.baselines.items():
        meaning = {"static": "one degree for all", "batch_adaptive": "one degree a micro-batch"}.get(
            name, name
        )
        yield f"{meaning}: {ms:,.1f} ms, {ms / plan.estimated_ms if plan.estimated_ms else 1:.2f} times as long"
    yield from plan.reasons
