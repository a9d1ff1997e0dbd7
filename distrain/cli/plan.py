"""``distrain plan``: solve one planning problem, show the plan and how good it is proven to be, and write it."""

import typer

from ._plan_buffers import buffers
from ._plan_memory import memory
from ._plan_sequence import sequence

plan = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@plan.callback()
def _plan() -> None:
    """Solve one planning problem: show the plan, how good it is proven to be, and write it with -o."""


plan.command(short_help="addresses for buffers with known lifetimes")(buffers)
plan.command(short_help="what is kept, swapped, computed again")(memory)
plan.command(short_help="groups of ranks for sequences of a step")(sequence)
