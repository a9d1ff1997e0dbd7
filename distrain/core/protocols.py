"""What rooms that never import each other, and loops that are not ours, agree to call.

Small on purpose: a Protocol has the methods somebody calls today. None of them needs to be inherited from.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:  # the sidecar imports this file and must not load torch
    import torch


@runtime_checkable
class Stateful(Protocol):
    """Something whose state survives a restart: modules, optimizers, schedulers, loaders."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state as it is now."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take on a state that ``state_dict`` returned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardBox:
    """The part of one tensor that a rank holds: ``global[offset : offset + shape]`` in every dim."""

    fqn: str
    """fully qualified name: the key in an unsharded state dict"""
    dtype: str
    """torch's name without the prefix: ``float32``, ``bfloat16``"""
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        dims = zip(self.offset, self.shape, self.global_shape, strict=True)
        if not all(0 <= start and 0 <= size and start + size <= whole for start, size, whole in dims):
            raise ValueError(f"the box leaves its tensor: {self}")


@runtime_checkable
class ShardedState(Protocol):
    """State that is sharded in a way DTensor does not describe (flat buckets of ZeRO-1, for one)."""

    def shards(self) -> "Iterator[tuple[ShardBox, torch.Tensor]]":
        """Each box of this rank with the memory that holds it; the tensor has the box's shape and dtype."""


class MicrobatchHooks(Protocol):
    """Wraps each piece of a pipeline schedule: the activation manager plans inside, the recorder times it."""

    def around(self, op: str, stage: int, micro_batch: int, *, last: bool) -> AbstractContextManager[None]:
        """Entered around one step of one stage, after what it waits for has arrived and before its result is sent.

        ``op`` is F, B, I or W (``planners.schedules.Op``). ``last`` says that no later step of this stage adds to
        its weights' gradients in this optimizer step.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCall:
    """One collective as this rank is about to issue it."""

    name: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, barrier, send, recv"""
    group: str
    """name of the group, equal on all of its ranks"""
    sequence: int
    """number of the call within the group; ranks in step agree on it"""
    num_bytes: int


class CollectiveHook(Protocol):
    """Wraps each collective: records are taken here, and faults injected (it may wait or raise)."""

    def collective(self, call: CollectiveCall) -> AbstractContextManager[None]:
        """Entered around issuing ``call``, on the thread that issues it."""
