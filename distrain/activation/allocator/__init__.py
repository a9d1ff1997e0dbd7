"""The planned allocator: a step's tensors in one arena, at addresses that were found before it ran.

The caching allocator of torch keeps freed blocks and splits them as requests come, and reserves more than ever lives at
once. Training asks for the same in every step, so places can be planned (MEMO, arXiv 2407.12117, section 4.2), with a
proof that no plan needs less. ``PlannedAllocator`` records, and follows the plan; what leaves the plan falls back.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bind import use_on_cuda as use_on_cuda
    from .plan import AllocationPlan as AllocationPlan
    from .plan import Request as Request
    from .plan import plan_requests as plan_requests
    from .planned import PlannedAllocator as PlannedAllocator
    from .planned import Recording as Recording
    from .report import AllocationReport as AllocationReport

_HOMES = {
    "AllocationPlan": ".plan",
    "AllocationReport": ".report",
    "PlannedAllocator": ".planned",
    "Recording": ".planned",
    "Request": ".plan",
    "plan_requests": ".plan",
    "use_on_cuda": ".bind",
}

__all__ = [
    "AllocationPlan",
    "AllocationReport",
    "PlannedAllocator",
    "Recording",
    "Request",
    "plan_requests",
    "use_on_cuda",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
