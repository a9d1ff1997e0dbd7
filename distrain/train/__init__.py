"""The trainer: a config-driven loop around a Llama-style decoder, with hooks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hooks import Hook, StepReport
    from .loop import Trainer
    from .model import Decoder

_HOMES = {"Decoder": ".model", "Hook": ".hooks", "StepReport": ".hooks", "Trainer": ".loop"}

__all__ = ["Decoder", "Hook", "StepReport", "Trainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
