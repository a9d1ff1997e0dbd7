"""What happens around the loop: hooks are told, in order, and the loop knows none of them by name.

A hook is anything with some of these methods; the built-in ones print, draw a progress bar and write events.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distrain.activation.ledger import ActivationReport
from distrain.checkpoint.cadence import Auto
from distrain.checkpoint.checkpointer import Checkpointer
from distrain.checkpoint.keeper_config import TierConfig
from distrain.core.config import RunConfig
from distrain.core.events import EventLog

from .state import TrainState

if TYPE_CHECKING:
    from .loop import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceReport:
    """How the ranks shared the sequences of a step."""

    groups: str
    """sizes of the groups of each micro-batch"""
    predicted_ms: float
    """by the cost model; 0 without one"""
    measured_ms: float
    """until every rank had the gradients"""
    gap: float
    """of the plan to its bound"""
    note: str
    """why the plan is not the planner's; empty if it is"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step, as every rank sees it."""

    step: int
    """from 1"""
    loss: float
    """mean over the tokens of the global batch, nats"""
    grad_norm: float
    """of the whole model, before clipping"""
    lr: float
    num_tokens: int
    seconds: float
    tokens_per_s: float
    mfu: float
    """achieved over peak FLOP/s of all devices"""
    peak_memory_bytes: int
    """of this rank"""
    sequences: SequenceReport | None = None
    """where groups of ranks share them"""
    activations: ActivationReport | None = None
    """of this rank, where they are managed"""


class Hook:
    """Everything the loop tells; subclass and override what is of interest."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step."""

    def on_step(self, trainer: "Trainer", report: StepReport) -> None:
        """After each step."""

    def on_validation(self, trainer: "Trainer", *, step: int, loss: float) -> None:
        """After each validation; ``loss`` in nats a token."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step, also if that was asked for; not called when the loop fails."""


class WriteEvents(Hook):
    """Scalars of each step to the event log."""

    def __init__(self, events: EventLog) -> None:
        self._events = events

    def on_start(self, trainer: "Trainer") -> None:
        """Note what is trained, and how it is laid out."""
        self._events.event("start", num_params=trainer.shape.num_params, plan=trainer.plan.to_json())

    def on_step(self, trainer: "Trainer", report: StepReport) -> None:
        """One scalar a number of the report."""
        for name in ("loss", "grad_norm", "lr", "tokens_per_s", "mfu", "peak_memory_bytes", "seconds"):
            self._events.scalar(name, getattr(report, name), step=report.step)
        if report.sequences is not None:
            self._events.event("sequences", step=report.step, **asdict(report.sequences))
        if report.activations is not None:
            self._events.event("activations", step=report.step, **asdict(report.activations))

    def on_validation(self, trainer: "Trainer", *, step: int, loss: float) -> None:
        """The validation loss."""
        self._events.scalar("validation_loss", loss, step=step)

    def on_end(self, trainer: "Trainer") -> None:
        """Mark that the run came to its end, for readers of the file."""
        self._events.event("end", step=trainer.step)


class SaveCheckpoints(Hook):
    """Restores before the first step, and says after each one that it is done."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._checkpoints: Checkpointer | None = None

    def on_start(self, trainer: "Trainer") -> None:
        """Go on from the newest step that all ranks can read."""
        options, folder = self._config.checkpoint, checkpoint_folder(self._config)
        disk = TierConfig(url=str(folder), every=max(1, options.disk_every), keep_last=options.keep_last)
        self._checkpoints = Checkpointer(
            folder,
            every=Auto(overhead=options.overhead) if options.auto else options.every,
            tiers=[TierConfig(**asdict(tier)) for tier in options.tiers] or [disk],
            lazy=options.lazy,
            policy=options.policy,
            strict=options.strict,
            device=self._config.launch.device,
        )
        self._checkpoints.track(train=TrainState(trainer))
        self._checkpoints.restore()

    def on_step(self, trainer: "Trainer", report: StepReport) -> None:
        """Start a snapshot if one is due; the last step goes to the disk in any case."""
        assert self._checkpoints is not None
        if trainer.is_done:
            self._checkpoints.save(report.step, durable=True)
        else:
            self._checkpoints.step(report.step)

    def on_end(self, trainer: "Trainer") -> None:
        """Leave when everything is on disk."""
        assert self._checkpoints is not None
        self._checkpoints.close()


def checkpoint_folder(config: RunConfig) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(config.checkpoint.path or Path(config.run_dir) / "checkpoints").resolve()


class Narrate(Hook):
    """Lines on standard output, and a progress bar below them where that is a terminal."""

    def __init__(self, *, log_every: int) -> None:
        self._log_every = log_every
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._task = self._bar.add_task("steps")
        self._first_loss: float | None = None
        self._num_tokens = 0
        self._seconds = 0.0
        self._last: StepReport | None = None
        self._note = ""
        self._is_first = True

    def on_start(self, trainer: "Trainer") -> None:
        """Print the layout."""
        for line in trainer.describe():
            self._console.print(line)
        if trainer.step:
            self._console.print(f"resumed after step {trainer.step}")
        self._bar.update(self._task, total=trainer.config.train.steps, completed=trainer.step)
        self._bar.start()

    def on_step(self, trainer: "Trainer", report: StepReport) -> None:
        """One line each ``log_every`` steps."""
        self._first_loss = report.loss if self._first_loss is None else self._first_loss
        self._num_tokens += report.num_tokens
        self._seconds += report.seconds
        self._last = report
        self._bar.update(self._task, completed=report.step)
        if report.step % self._log_every == 0 or report.step == 1:
            self._console.print(
                f"step {report.step:>6}  loss {report.loss:7.4f}  norm {report.grad_norm:6.2f}  lr {report.lr:.2e}"
                f"  {report.tokens_per_s:>9,.0f} tokens/s  MFU {report.mfu:5.1%}"
                f"  {report.peak_memory_bytes / 2**20:,.0f} MiB{_sequence_words(report.sequences)}"
            )
        if report.activations is not None and (self._is_first or not report.activations.as_planned):
            self._console.print(str(report.activations), markup=False, highlight=False)
        self._is_first = False
        if report.sequences is not None and report.sequences.note != self._note:
            self._note = report.sequences.note
            said = f"one degree for all groups: {self._note}" if self._note else "the planner's groups again"
            self._console.print(f"step {report.step:>6}  {said}")

    def on_validation(self, trainer: "Trainer", *, step: int, loss: float) -> None:
        """One line."""
        self._console.print(f"step {step:>6}  validation loss {loss:7.4f}")

    def on_end(self, trainer: "Trainer") -> None:
        """The summary."""
        self._bar.stop()
        if self._last is not None and self._first_loss is not None:
            done = f"stopped after step {trainer.step} as asked" if trainer.is_stopped else "done"
            self._console.print(
                f"{done}: loss {self._first_loss:.3f} -> {self._last.loss:.3f} nats a token in {self._seconds:.0f} s,"
                f" {self._num_tokens:,} tokens, {self._num_tokens / self._seconds:,.0f} tokens/s"
                f"; events in {trainer.config.run_dir}/events.jsonl"
            )


def _sequence_words(sequences: SequenceReport | None, *, most: int = 8) -> str:
    """Groups and times for a line of the log, of a few micro-batches at the most."""
    if sequences is None:
        return ""
    groups = sequences.groups.split(" | ")
    shown = " | ".join(groups[:most]) + (f" | {len(groups) - most} more" if len(groups) > most else "")
    predicted = f", predicted {sequences.predicted_ms:,.0f} ms" if sequences.predicted_ms else ""
    return f"  groups {shown}{predicted}, took {sequences.measured_ms:,.0f} ms"
