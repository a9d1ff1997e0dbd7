"""Groups of ranks and what they do together: tensor, pipeline, data and sequence parallelism."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context import Parallel, init
    from .groups import GroupRegistry
    from .pipeline.runtime import MicroBatch, PipelineRuntime
    from .roles import Role

_HOMES = {
    "GroupRegistry": ".groups",
    "MicroBatch": ".pipeline.runtime",
    "Parallel": ".context",
    "PipelineRuntime": ".pipeline.runtime",
    "Role": ".roles",
    "init": ".context",
}

__all__ = ["GroupRegistry", "MicroBatch", "Parallel", "PipelineRuntime", "Role", "init"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
