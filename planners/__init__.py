"""Pure mathematics on dataclasses: schedules, layouts, memory. No torch, no processes."""

if not __name__.startswith("distrain."):
    raise ImportError(f"{__name__} is a part of distrain: import distrain.{__name__} instead")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .memory import estimate as estimate
    from .parallelism import ParallelPlan as ParallelPlan
    from .parallelism import choose as choose
    from .schedule_checks import verify as verify
    from .schedules import build as build
    from .timeline import draw as draw
    from .timeline import simulate as simulate

_HOMES = {
    "ParallelPlan": ".parallelism",
    "build": ".schedules",
    "choose": ".parallelism",
    "draw": ".timeline",
    "estimate": ".memory",
    "simulate": ".timeline",
    "verify": ".schedule_checks",
}

__all__ = ["ParallelPlan", "build", "choose", "draw", "estimate", "simulate", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
