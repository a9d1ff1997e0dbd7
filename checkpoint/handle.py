"""One save on its way, for whoever wants to know how far it is."""

from collections.abc import Callable
from dataclasses import dataclass

from distrain.core.sidecar_client import StepStatus


@dataclass(frozen=True, slots=True)
class SaveHandle:
    """A snapshot that has begun; true, so that ``if save(...)`` asks whether one has."""

    step: int
    fence: Callable[[], None]
    """returns when the state may change"""
    _wait: Callable[..., StepStatus]

    def wait(self, level: str = "committed", *, tier: str | None = None) -> StepStatus:
        """Wait until the step is sealed, protected or committed (on ``tier``, or on any), or never will be."""
        return self._wait(self.step, level=level, tier=tier)
