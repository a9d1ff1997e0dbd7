"""``distrain train CONFIG``: check everything, plan, then start the ranks here and train."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="A run's TOML file.", metavar="CONFIG", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value, as section.key=value.", metavar="K=V")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print layout and memory; start nothing.")
    ] = False,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", help="Ranks to plan for, with --dry-run.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: print the plan as JSON.")] = False,
) -> int:
    """Train the model of a config: plan, launch, train.

    \b
    Examples:
      distrain train examples/tiny.toml
      distrain train run.toml --set train.steps=50 --set parallel.tp=4
      distrain train run.toml --dry-run --world-size 1024
    """
    from distrain.core.errors import ConfigError
    from distrain.core.load import load
    from distrain.launch import run_job
    from distrain.train.prepare import check_all, prepare

    if world_size is not None and not dry_run:
        raise ConfigError(
            "--world-size is for planning only",
            got=f"--world-size {world_size} without --dry-run",
            hint=f"--dry-run, or --set launch.ranks={world_size} to start so many ranks here",
        )
    run = load(
        config,
        overrides=overrides or (),
        check=lambda run: check_all(run, world_size or run.launch.ranks),
    ).config
    ranks = world_size or run.launch.ranks
    prepared = prepare(run, world_size=ranks, here=world_size is None)
    if dry_run:
        print(json.dumps(prepared.to_dict(), indent=1) if as_json else "\n".join(prepared.describe()))
        return 0
    worker = [sys.executable, "-m", "distrain.train", str(prepared.write())]
    return run_job(worker, ranks=ranks, plan=prepared.plan_path, plain_rank=0, holds_keeper=False)
