"""Three lines in somebody else's loop: everything of Distrain that a loop needs not be built around.

::

    run = distrain.attach(model=model, optimizer=optimizer, scheduler=scheduler, data=loader)
    start = run.restore()
    for step in range(start, steps):
        loss = train_step(next(loader))
        optimizer.step()
        run.step(step + 1, loss=loss)
    run.close()
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distrain.checkpoint.checkpointer import Checkpointer
from distrain.core.events import EventLog, JsonlSink


class Run:
    """A loop with checkpoints and an event log; see ``attach``."""

    def __init__(self, checkpoints: Checkpointer, events: EventLog) -> None:
        self.checkpoints, self.events = checkpoints, events

    def restore(self, *, strict: bool = True) -> int:
        """Go on from the newest step that every rank can read, in memory or on disk; 0 if there is none."""
        return self.checkpoints.restore(strict=strict)

    def step(self, step: int, **scalars: float) -> None:
        """Say that ``step`` steps are done: a snapshot starts if one is due, and ``scalars`` are noted."""
        for name, value in scalars.items():
            self.events.scalar(name, float(value), step=step)
        self.checkpoints.step(step)

    def close(self) -> None:
        """Let what is due reach the disk, and leave."""
        self.checkpoints.close()
        self.events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def attach(path: str | Path = "runs/attached", *, every: int = 1, device: str = "auto", **things: Any) -> Run:
    """Checkpoints and events for a loop of one's own, in the folder ``path``; finds or starts the node's keeper.

    ``things`` are what a restart needs: modules, optimizers, anything with ``state_dict`` and ``load_state_dict``.
    ``every`` is the number of steps between two snapshots. The same call on every rank.
    """
    folder = Path(path)
    checkpoints = Checkpointer(folder / "checkpoints", every=every, device=device)
    checkpoints.track(**things)
    sinks = []
    if checkpoints.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        sinks = [JsonlSink(folder / "events.jsonl")]
    return Run(checkpoints, EventLog(sinks, rank=checkpoints.rank))
