"""``distrain simulate``: goodput of a job under failures, and the checkpoint interval that serves it best."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from distrain.core.errors import ConfigError, Problem, raise_if


def simulate(
    config: Annotated[
        Path | None, typer.Argument(help="A scenario's TOML file.", metavar="SCENARIO", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value, as section.key=value.", metavar="K=V")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="job.gpus", show_default=False)] = None,
    days: Annotated[float | None, typer.Option(help="job.days", show_default=False)] = None,
    spares: Annotated[int | None, typer.Option(help="job.spare_nodes", show_default=False)] = None,
    mix: Annotated[
        str | None,
        typer.Option(help="failures.mix: llama3, c4, byterobust or megascale.", show_default=False),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="failures.trace: JSON lines of t_s, node, class, repair_s.", show_default=False),
    ] = None,
    interval: Annotated[
        str | None, typer.Option(help="checkpoint.interval_s: seconds, or auto.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs, each with failures of its own.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="The first of the seeds.")] = 0,
    search: Annotated[
        bool, typer.Option("--search", help="Find the best checkpoint interval, with the curve.")
    ] = False,
    measure: Annotated[
        Path | None,
        typer.Option(
            help="Take stall, restore and restart from this machine, saving to this folder.",
            metavar="FOLDER",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    state_gb: Annotated[
        float, typer.Option(min=0.001, help="With --measure: state of a node, in 10^9 bytes.")
    ] = 10.0,
    plot: Annotated[Path | None, typer.Option(help="Write plots (SVG) here.", metavar="FOLDER")] = None,
    save_trace: Annotated[
        Path | None, typer.Option(help="Write the failures of the first seed.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Simulate a job under failures: effective training time, what ate the rest, the best interval.

    Without SCENARIO it is Llama 3 405B: 16,384 GPUs, 30 days, the failures that were published.

    \b
    Examples:
      distrain simulate
      distrain simulate --gpus 100000 --spares 500 --search
      distrain simulate examples/simulate/levels.toml --plot plots
      distrain simulate --mix c4 --gpus 4096 --interval 1800 --set failures.frailty=1.5
      distrain simulate --trace failures.jsonl --json
    """
    flags = {
        "job.gpus": gpus,
        "job.days": days,
        "job.spare_nodes": spares,
        "failures.mix": mix,
        "failures.trace": None if trace is None else str(trace),
        "checkpoint.interval_s": None if interval is None else _value(interval),
    }
    overrides = {
        **_measured(measure, state_gb),
        **{key: value for key, value in flags.items() if value is not None},
        **dict(_parsed(settings or [])),
    }
    from distrain.faults import simulate as simulation

    from ._simulations import Report, progress

    scenario = simulation.load_scenario(config, overrides=overrides)
    if plot is not None:
        from distrain.planners.drawing import require

        require()
    chosen = range(seed, seed + (1 if scenario.failures.trace else seeds))
    total = len(chosen) + (simulation.num_runs(chosen) if search else 0)
    with progress(total) as advance:
        outcomes = simulation.run_seeds(scenario, chosen, progress=advance)
        curve = simulation.search(scenario, chosen, progress=advance) if search else None
    failures = scenario.failures_of(seed)
    report = Report(scenario, outcomes, curve, scenario.interval_s(failures), scenario.mtbf_s(failures))
    written = []
    try:
        if save_trace is not None:
            from distrain.faults.simulate.trace import write_trace

            write_trace(save_trace, failures)
            written.append(save_trace)
        if plot is not None:
            from distrain.faults.simulate.plots import plot as draw

            written += draw(plot, outcomes, curve)
    except OSError as error:
        raise ConfigError("this cannot be written", got=f"{error.filename}: {error.strerror}") from None
    report.print_json(written) if as_json else report.show(written)


def _measured(folder: Path | None, state_gb: float) -> dict[str, object]:
    if folder is None:
        return {}
    from distrain.faults.simulate.measure import measure

    try:
        return measure(folder, state_bytes=state_gb * 1e9).overrides()
    except OSError as error:
        raise ConfigError("nothing can be measured there", got=f"--measure {folder}: {error}") from None


def _parsed(settings: list[str]) -> Iterator[tuple[str, Any]]:
    """Key and value of each ``--set``; those without a value are problems."""
    pairs = [text.partition("=") for text in settings]
    raise_if(
        [
            Problem("an override has no value", f"--set {key}", "section.key=value", "--set job.days=10")
            for key, equals, _ in pairs
            if not equals
        ]
    )
    for key, _, value in pairs:
        yield key.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """``text`` as TOML would read it; what is no TOML is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
