"""The command line: a table of verbs, and the one place where an error becomes an exit code.

A verb lives in the file of its name and is imported when it is called, so ``distrain --help`` costs what
Typer costs and one broken verb leaves the others standing. The file exposes, under its own name, a function
with Typer annotations, or a Typer app where the verb has verbs of its own. What it returns is the exit code;
None is 0.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from distrain.core.errors import DistrainError, nearest

EXAMPLES = """
\b
Examples:
  distrain train examples/tiny.toml                  train a small model on this machine
  distrain train run.toml --set train.steps=50       override a value
  distrain train run.toml --dry-run --world-size 64  print layout and memory, start nothing
  distrain launch --nproc-per-node 4 script.py       start any torchrun script
  distrain config show run.toml --origin             where does each value come from
"""


@dataclass(frozen=True, slots=True)
class Verb:
    """One line of the help; ``raw`` verbs receive their arguments as they stand, ``--help`` included."""

    group: str
    help: str
    raw: bool = False


VERBS = {
    "train": Verb("Run", "train the model of a config: plan, launch, train"),
    "launch": Verb("Run", "start a script, module or config on many ranks: torchrun's flags", raw=True),
    "drill": Verb("Run", "run a job under a fault plan, and score how it comes through"),
    "plan": Verb("Plan", "sequence groups, memory, buffers: planned, with a bound"),
    "simulate": Verb("Plan", "goodput of a job under failures, and the best checkpoint interval"),
    "doctor": Verb("Look", "what this machine can do, and what sequences cost on it"),
    "ckpt": Verb("Look", "list, inspect, verify, convert, repair and collect checkpoints"),
    "config": Verb("Look", "show a config as it is resolved, and where each value comes from"),
}


class _RawCommand(TyperCommand):
    """Hands the words after the verb through untouched: parsing would swallow ``--`` and refuse flags."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


class _Verbs(TyperGroup):
    """Imports a verb when it is called, and turns what leaves it into exit codes."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            close = nearest(cmd_name, VERBS)
            ctx.fail(f"no such command: {cmd_name}" + (f"; did you mean {close}?" if close else ""))
        return _load(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for group in dict.fromkeys(verb.group for verb in VERBS.values()):
            with formatter.section(group):
                formatter.write_dl([(name, verb.help) for name, verb in VERBS.items() if verb.group == group])

    def invoke(self, ctx: Any) -> Any:
        try:
            code = super().invoke(ctx)
        except DistrainError as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            else:
                print(error, file=sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        raise typer.Exit(code or 0)


def _load(name: str) -> Any:
    """The command of one verb, from the file of its name."""
    face = getattr(import_module(f".{name}", __name__), name)
    if isinstance(face, typer.Typer):
        return typer.main.get_command(face)
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    if VERBS[name].raw:
        app.command(name, cls=_RawCommand, add_help_option=False)(_handing_over(face))
    else:
        app.command(name)(face)
    return typer.main.get_command(app)


def _handing_over(face: Callable[[list[str]], int]) -> Callable[[typer.Context], int]:
    def hand_over(ctx: typer.Context) -> int:
        return face(list(ctx.args))

    return hand_over


def _version(asked: bool) -> None:
    if asked:
        from ._version import describe

        print(describe())
        raise typer.Exit


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _distrain(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar="DISTRAIN_DEBUG")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show versions.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Train large models on GPU clusters, and keep the run alive."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``distrain argv``; the exit code is 0 done, 1 failed, 2 usage, 3 configuration, 130 interrupted."""
    try:
        app(args=sys.argv[1:] if argv is None else list(argv), prog_name="distrain")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0
