"""Activation memory: what a layer leaves for its backward, and how it is kept, moved or made again."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ledger import ActivationReport as ActivationReport
    from .manager import ActivationManager as ActivationManager
    from .segments import TokenSegments as TokenSegments
    from .trace import Trace as Trace
    from .trace import trace_module as trace_module

_HOMES = {
    "ActivationManager": ".manager",
    "ActivationReport": ".ledger",
    "TokenSegments": ".segments",
    "Trace": ".trace",
    "trace_module": ".trace",
}

__all__ = ["ActivationManager", "ActivationReport", "TokenSegments", "Trace", "trace_module"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
