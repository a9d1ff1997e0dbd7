"""Activation memory: what a layer leaves for its backward, and how it is kept, moved or made again."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trace import Trace as Trace
    from .trace import trace_module as trace_module

_HOMES = {"Trace": ".trace", "trace_module": ".trace"}

__all__ = ["Trace", "trace_module"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
