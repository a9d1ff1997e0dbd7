"""Break a job on purpose, know exactly when, and find out who notices: plans, what carries them out, ground truth.

Names are loaded when they are asked for: a keeper that is to be armed must not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arming import Armed, arm
    from .checks import JobShape, check
    from .injector import Injector
    from .plan import FaultPlan
    from .truth import Record, read_truth

_HOMES = {
    "Armed": ".arming",
    "FaultPlan": ".plan",
    "Injector": ".injector",
    "JobShape": ".checks",
    "Record": ".truth",
    "arm": ".arming",
    "check": ".checks",
    "read_truth": ".truth",
}

__all__ = ["Armed", "FaultPlan", "Injector", "JobShape", "Record", "arm", "check", "read_truth"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
