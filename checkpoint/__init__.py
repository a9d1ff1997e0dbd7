"""State that survives crashes: snapshots in memory, checkpoints on disk, and the way back from both.

Most files here are free of torch, since the node's keeper runs them; so names are loaded when they are asked for.
"""

if not __name__.startswith("distrain."):
    raise ImportError(f"{__name__} is a part of distrain: import distrain.{__name__} instead")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cadence import Auto
    from .checkpointer import Checkpointer
    from .handle import SaveHandle
    from .keeper_config import TierConfig
    from .zarr_store import zarr_view

_HOMES = {
    "Auto": ".cadence",
    "Checkpointer": ".checkpointer",
    "SaveHandle": ".handle",
    "TierConfig": ".keeper_config",
    "zarr_view": ".zarr_store",
}

__all__ = ["Auto", "Checkpointer", "SaveHandle", "TierConfig", "zarr_view"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
