"""Distrain: train large models on GPU clusters, and keep the run alive."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from distrain.checkpoint import Checkpointer as Checkpointer
    from distrain.core.config import RunConfig as RunConfig
    from distrain.integrations.attaching import attach as attach

__version__ = "0.1.0"

if not (_Path(__file__).parent / "launch").is_dir():  # a source checkout: the rooms are siblings
    __path__.append(str(_Path(__file__).resolve().parent.parent))

_HOMES = {
    "Checkpointer": "distrain.checkpoint.checkpointer",
    "RunConfig": "distrain.core.config",
    "attach": "distrain.integrations.attaching",
}

__all__ = ["Checkpointer", "RunConfig", "attach"]


def __getattr__(name: str) -> _Any:
    # Loaded when asked for: `import distrain` must not load torch.
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
