"""Our activation manager in its modes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from distrain.activation import ActivationManager, ActivationReport
from distrain.planners.activation_plan import ActivationPlan, uniform

from .base import Contender


@dataclass
class Ours(Contender):
    """Layers under one plan; the last two of memo and swap keep what they save, as planned."""

    mode: str = "memo"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.manager = ActivationManager(self.layers, self.plan())

    def plan(self) -> ActivationPlan:
        """The plan of the mode."""
        return uniform(
            self.mode, num_layers=len(self.layers), num_tokens=self.job.num_tokens, alpha=self.alpha
        )

    @contextmanager
    def around(self) -> Iterator[None]:
        """The manager's block."""
        with self.manager:
            yield

    def report(self) -> ActivationReport:
        """What it says of the steps since the last report."""
        return self.manager.report()
