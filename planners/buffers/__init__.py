"""Addresses for buffers whose lifetimes are known: bounds, heuristics, a complete search, a MIP, a check.

``solve`` takes buffers and returns a ``BufferPlan``; ``table`` reads and writes them as CSV.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bilevel import Levels as Levels
    from .bilevel import solve_by_layers as solve_by_layers
    from .planner import solve as solve
    from .problem import Buffer as Buffer
    from .result import BufferPlan as BufferPlan
    from .result import Status as Status
    from .validate import violations as violations

_HOMES = {
    "Buffer": ".problem",
    "BufferPlan": ".result",
    "Levels": ".bilevel",
    "Status": ".result",
    "solve": ".planner",
    "solve_by_layers": ".bilevel",
    "violations": ".validate",
}

__all__ = ["Buffer", "BufferPlan", "Levels", "Status", "solve", "solve_by_layers", "violations"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
