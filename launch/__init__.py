"""Start, place and stop the processes of a job: a drop-in for torchrun that can also emulate nodes."""

if not __name__.startswith("distrain."):
    raise ImportError(f"{__name__} is a part of distrain: import distrain.{__name__} instead")

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import run_job as run_job

__all__ = ["run_job"]


def __getattr__(name: str) -> object:
    if name == "run_job":
        from .run import run_job

        return run_job
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
