"""``distrain doctor``: what this machine can do, native code built, and the cost of sequences measured."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distrain.core.config import RunConfig
    from distrain.launch.doctor import Finding
    from distrain.planners.sequence.fit import Fit

NATIVE = ("distrain.planners.sequence.native", "distrain.planners.buffers.engine")
"""modules with a ``build`` of their own"""


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(help="With --profile: the run to measure.", metavar="CONFIG", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value of the run.", metavar="K=V")
    ] = None,
    build: Annotated[
        bool, typer.Option("--build", help="Compile the native code that is not built.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Time sequences of many lengths and degrees, and fit a cost model."),
    ] = False,
    longest: Annotated[
        int | None,
        typer.Option(
            "--longest", help="With --profile: tokens of the longest group; data.seq_len otherwise."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="With --profile: the cost model's file.", show_default="cost.toml"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Say what this node, its network, disk, GPUs and installation can do.

    The exit code is 1 if something is broken that every run needs. What is merely limited says what it would give.

    \b
    Examples:
      distrain doctor
      distrain doctor --build
      distrain doctor --profile examples/adaptive.toml -o cost.toml
      distrain doctor --profile run.toml --set launch.ranks=8 --longest 65536
    """
    from distrain.core.errors import Problem, raise_if

    given = {"CONFIG": config, "--set": overrides, "--longest": longest, "--out": out}
    unused = [name for name, value in given.items() if value and not profile]
    problems = [
        Problem(f"{name} is for --profile only", hint="distrain doctor --profile CONFIG") for name in unused
    ]
    if profile and config is None:
        problems.append(Problem("no run to measure", hint="distrain doctor --profile CONFIG"))
    raise_if(problems)
    if profile:
        assert config is not None
        return _profile(
            config, overrides or [], longest=longest, out=out or Path("cost.toml"), as_json=as_json
        )
    if build:
        _build()
    from distrain.launch.doctor import Health, examine

    findings = examine(Path.cwd())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print(findings)
    return 1 if any(finding.health is Health.BROKEN for finding in findings) else 0


def _print(findings: "list[Finding]") -> None:
    from rich.console import Console
    from rich.text import Text

    colours = {"ok": "green", "limited": "yellow", "broken": "red"}
    width = max(len(each.name) for each in findings)
    console, area = Console(soft_wrap=True), ""
    for each in findings:
        if each.area != area:
            console.print(Text(each.area, style="bold"))
            area = each.area
        line = Text(f"  {each.health:8}", style=colours[each.health])
        line.append(f"{each.name:{width}}  {each.value}", style="default")
        console.print(line.append(f"  ({each.hint})" if each.hint else "", style="default"))


def _build() -> None:
    """Compile what planners search with, saying how it went; a machine without a compiler still trains."""
    from importlib import import_module

    from distrain.core.errors import MissingDependencyError

    for module in NATIVE:
        try:
            import_module(module).build()
            said = "built"
        except MissingDependencyError as error:
            said = f"not built: {error}"
        print(f"native   {module.removeprefix('distrain.').rpartition('.')[0]}: {said}", file=sys.stderr)


def _profile(config: Path, overrides: list[str], *, longest: int | None, out: Path, as_json: bool) -> int:
    from distrain.core.errors import ConfigError
    from distrain.core.load import load
    from distrain.launch import run_job
    from distrain.train.prepare import prepare
    from distrain.train.sequences.profile import Profile, rows

    if not out.resolve().parent.is_dir():
        raise ConfigError("this cannot be written", got=f"{out}: no such folder")
    run = _plain(load(config, overrides=overrides).config, longest=longest)
    prepared = prepare(run, world_size=run.launch.ranks, here=True)
    written = prepared.write()
    measured = written.with_name("profile.json")
    measured.unlink(missing_ok=True)
    worker = [sys.executable, "-m", "distrain.train.sequences.measure", str(written), str(measured)]
    code = run_job(worker, ranks=run.launch.ranks, plan=prepared.plan_path, plain_rank=0)
    if code:
        return code
    profile = Profile.load(measured)
    fitted = profile.fit(run.model.shape())
    out.write_text(profile.to_toml(fitted))
    if as_json:
        found = {"mean_error": fitted.mean_error, "worst_error": fitted.worst_error, "written": str(out)}
        print(json.dumps({"cost": asdict(fitted.cost), **found}, indent=1))
        return 0
    _print_fit(rows(profile, fitted), fitted)
    print(f"written to {out}")
    return 0


def _plain(run: "RunConfig", *, longest: int | None) -> "RunConfig":
    """The run without what its cost model decides, which need not exist yet, with the least batch there is.

    It has a folder of its own: ranks of the run itself, should they start again, read what is in theirs.
    """
    from distrain.core.config import ParallelConfig

    names = ("sequence", "sequence_degree", "sequence_ring", "sequence_cost")
    default, pp = ParallelConfig(), run.parallel.pp
    parallel = replace(run.parallel, micro_batches=pp, **{name: getattr(default, name) for name in names})
    replicas = parallel.degrees(run.launch.ranks).dp
    data = replace(run.data, global_batch=replicas * pp, seq_len=longest or run.data.seq_len)
    return replace(run, run_dir=str(Path(run.run_dir) / "profile"), parallel=parallel, data=data)


def _print_fit(samples: "Sequence[tuple[int, str, float, float]]", fitted: "Fit") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "degree", "group, tokens", "measured, ms", "model, ms", "off", box=None, header_style="bold"
    )
    for degree, group, measured_ms, model_ms in samples:
        off = model_ms / measured_ms - 1
        table.add_row(str(degree), group, f"{measured_ms:.2f}", f"{model_ms:.2f}", f"{off:+.1%}")
    Console().print(table)
    cost = fitted.cost
    speeds = ", ".join(f"{degree}: {speed:.3g}" for degree, speed in cost.bandwidth_gb_s.items())
    print(
        f"alpha1 {cost.alpha1:.3g} ms/token^2, alpha2 {cost.alpha2:.3g} ms/token, beta1 {cost.beta1:.3g} ms,"
        f" GB/s by degree {{{speeds}}}, {cost.tokens_per_gpu:,} tokens a device;"
        f" off by {fitted.mean_error:.1%} on average, {fitted.worst_error:.1%} at the worst"
    )
