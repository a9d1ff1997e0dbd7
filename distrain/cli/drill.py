"""``distrain drill PLAN JOB``: run a job under a fault plan, launch it again after failures, and score it."""

import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from distrain.core.config import RunConfig
    from distrain.core.errors import Problem
    from distrain.faults.drill import Command
    from distrain.faults.inject import JobShape
    from distrain.faults.score import Score


def drill(
    plan: Annotated[Path, typer.Argument(help="What goes wrong, as TOML or JSON.", show_default=False)],
    job: Annotated[Path, typer.Argument(help="A run's TOML file, or a training script.", show_default=False)],
    args: Annotated[
        list[str] | None, typer.Argument(help="Arguments of the script, after --.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value of the run.", metavar="K=V")
    ] = None,
    ranks: Annotated[int, typer.Option("--ranks", help="Ranks of a script.", min=1)] = 2,
    emulate_nodes: Annotated[
        int, typer.Option("--emulate-nodes", help="Local nodes to spread the ranks over.", min=1)
    ] = 1,
    netns: Annotated[
        bool, typer.Option("--netns", help="Give each of these nodes a network of its own, for net.* faults.")
    ] = False,
    launches: Annotated[
        int, typer.Option("--launches", help="How often to start the job at most.", min=1)
    ] = 4,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Seconds after which a launch counts as hanging.", min=1.0)
    ] = 900.0,
    reference: Annotated[
        bool, typer.Option(help="Also run the job undisturbed, and compare the final states.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for logs, truth and score.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the score as JSON.")] = False,
) -> int:
    """Break a job on purpose, and see what it notices, loses and gets back.

    The drill passes (exit code 0) if every fault fired, every expectation of the plan was met and the job came to its
    end; a script's own RANK, WORLD_SIZE and so on are those of torchrun.

    \b
    Examples:
      distrain drill examples/drills/kill.toml examples/tiny.toml --set train.steps=20 --set checkpoint.every=2
      distrain drill plan.toml train.py --ranks 4 --emulate-nodes 2 -- --lr 0.1
      distrain drill examples/drills/partition.toml examples/tiny.toml --set train.steps=20 --emulate-nodes 2 --netns
      distrain drill plan.toml run.toml --no-reference --json
    """
    from distrain.core.errors import ConfigError, Problem, raise_if
    from distrain.core.netns import HINT
    from distrain.core.netns import missing as netns_missing
    from distrain.faults.drill import Drill, run, to_json
    from distrain.faults.inject import FaultPlan

    is_run = job.suffix == ".toml"
    unused = {"--ranks": ranks != 2, "arguments after --": bool(args)}
    problems = [
        Problem(f"{name} is not used by a run's TOML", hint="--set launch.ranks=N says how many ranks it has")
        for name, is_given in unused.items()
        if is_run and is_given
    ]
    if overrides and not is_run:
        problems.append(Problem("--set is not used by a script", hint="its own arguments come after --"))
    if netns and emulate_nodes == 1:
        problems.append(Problem("--netns is for emulated nodes", "1 node", hint="--emulate-nodes 2"))
    elif netns and (missing := netns_missing()):
        problems.append(Problem("nodes cannot have networks of their own here", missing, hint=HINT))
    if out and any((out / name).exists() for name in ("sound", "faulty")):
        problems.append(Problem("there is a drill in this folder already", str(out), "a new or empty folder"))
    try:
        if is_run:
            shape, command = _run(job, overrides or (), nodes=emulate_nodes, netns=netns)
        else:
            shape, command = _script(job, args or (), ranks=ranks, nodes=emulate_nodes, netns=netns)
    except ConfigError as error:  # of the plan, what can be told without knowing the job
        raise ConfigError.of([*problems, *error.problems, *_problems(plan, None)]) from None
    if shape.world_size % emulate_nodes:
        got, allowed = f"{shape.world_size} ranks", f"a multiple of {emulate_nodes}"
        problems.append(Problem("the ranks cannot be spread over the nodes", got, allowed))
    raise_if([*problems, *_problems(plan, shape)])
    faults = FaultPlan.load(plan)
    folder = (out or Path(tempfile.mkdtemp(prefix=f"drill-{plan.stem}-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sound", "faulty"):
        (folder / name).mkdir()
    # As on Ctrl-C: the job, which is in a session of its own, is ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found = run(
        Drill(
            plan=faults,
            job=shape,
            command=command,
            folder=folder,
            compare=_same_state,
            max_launches=launches,
            timeout_s=timeout_s,
            with_reference=reference,
            in_run_folder=not is_run,
        ),
        say=lambda text: print(f"drill: {text}", file=sys.stderr, flush=True),
    )
    if as_json:
        print(json.dumps(to_json(found), indent=1))
    else:
        _print(found, folder)
    return 1 if found.problems else 0


def _problems(plan: Path, job: "JobShape | None") -> "Sequence[Problem]":
    """All that is wrong with a plan: as a file and, if the job is known, for that."""
    from distrain.core.errors import ConfigError, Problem
    from distrain.faults.inject import FaultPlan

    try:
        faults = FaultPlan.load(plan, job=job).faults
    except ConfigError as error:
        return error.problems
    hint = "[[faults]] with a kind; docs/faults.md lists them"
    return [] if faults else [Problem("the plan has no fault, so any job would pass", str(plan), hint=hint)]


def _run(config: Path, overrides: Sequence[str], *, nodes: int, netns: bool) -> "tuple[JobShape, Command]":
    """A run of our own trainer, which saves its last state in any case, so that it can be compared.

    Whatever the run has saved elsewhere is neither read nor written: its checkpoints lie in its folder of the drill.
    """
    from distrain.core.checks import check_run
    from distrain.core.load import load
    from distrain.faults.command import launch_words
    from distrain.faults.inject import JobShape

    def checked(run: "RunConfig") -> Any:
        return check_run(run, run.launch.ranks)

    run = load(config, overrides=overrides, check=checked).config
    saves = [] if run.checkpoint.enabled else [f"checkpoint.every={run.train.steps}"]
    shape = JobShape(world_size=run.launch.ranks, num_nodes=nodes, steps=run.train.steps, has_network=netns)

    def command(folder: Path) -> Sequence[str]:
        sets = [*overrides, *saves, f"run_dir={folder}", "checkpoint.path=", "checkpoint.tiers=[]"]
        if nodes > 1:
            words = launch_words(ranks=shape.world_size, nodes=nodes, netns=netns)
            return [*words, str(config), *sets]
        return [sys.executable, "-m", "distrain", "train", str(config), *(f"--set={item}" for item in sets)]

    return shape, command


def _script(
    script: Path, args: Sequence[str], *, ranks: int, nodes: int, netns: bool
) -> "tuple[JobShape, Command]":
    """Somebody's script; its run folder is the working folder of its ranks."""
    from distrain.core.errors import ConfigError
    from distrain.faults.command import script_words
    from distrain.faults.inject import JobShape

    if not script.is_file():
        raise ConfigError(
            "there is no such script", got=str(script), allowed="a Python file, or a run's TOML"
        )
    words = script_words(script, args, ranks=ranks, nodes=nodes, netns=netns)
    return JobShape(world_size=ranks, num_nodes=nodes, has_network=netns), lambda folder: words


def _same_state(sound: Path, faulty: Path) -> bool | None:
    """Whether the last checkpoints of two runs are equal to the bit; None if there are none.

    The states of random generators are left aside: a job that does not seed one has another in every run.
    """
    from distrain.checkpoint.diff import diff
    from distrain.checkpoint.locate import locate
    from distrain.checkpoint.tensors import TensorReader
    from distrain.core.errors import DataError

    try:
        found = [locate(_checkpoints(folder)) for folder in (sound, faulty)]
    except DataError:
        return None
    if found[0].manifest.step != found[1].manifest.step:
        return False
    first, second = (TensorReader(each.storage, each.folder, each.manifest) for each in found)
    return all(each.what == "object" and each.name == "rng" for each in diff(first, second))


def _checkpoints(run: Path) -> Path:
    """Where a run keeps its checkpoints: a script attaches in a folder of its own."""
    return next(run.glob("*/checkpoints"), run / "checkpoints")


def _print(found: "Score", folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    names = ("on", "step", "noticed as", "suspects", "noticed after", "recovered after", "")
    table = Table("fault", *names, box=None, header_style="bold")
    table.columns[0].no_wrap = True
    for row in found.faults:
        table.add_row(
            str(row.kind),
            str(row.victim),
            "" if row.step is None else str(row.step),
            f"{row.detected} ({row.source})" if row.detected else "not noticed" if row.fired_ns else "",
            ", ".join(map(str, row.suspects)),
            _seconds(row.detect_s),
            _seconds(row.recover_s),
            "failed" if row.problems else "ok",
        )
    console = Console(highlight=False)
    console.print(table)
    state = {True: "equal to the bit", False: "different", None: "not compared"}[found.is_equal]
    console.print(
        f"launches: {found.num_launches}, steps trained twice: {found.steps_lost}, goodput {found.goodput:.0%} after "
        f"{found.startup_s:.1f} s to start ({found.restarts_s:.1f} s to start again count), final state: {state}; "
        f"logs and score in {folder}"
    )
    for problem in found.problems:
        console.print(f"failed: {problem}")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
