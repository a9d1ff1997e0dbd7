"""What a layer's author knows of it, where trying is not enough.

Trying finds out what works token by token, and recomputes only what comes out equal to the bit. Somebody may know more:
that a part is not worth trying, or must not run twice (``core``); or that other roundings are welcome in exchange for
memory, as when a GPU's library takes another kernel for fewer rows (``pre`` and ``post``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from distrain.core.errors import Problem, nearest

from .tape import Tape


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSegments:
    """Submodules of a layer, by name, around what mixes its tokens."""

    pre: Sequence[str] = ()
    """token-local before ``core``; recomputed even if the results then differ in rounding"""
    core: Sequence[str] = ()
    """never recomputed by token: what it saves is swapped or kept whole"""
    post: Sequence[str] = ()
    """as ``pre``, after ``core``"""

    def problems(self, layer: nn.Module) -> list[Problem]:
        """Names that ``layer`` has no module for."""
        known = dict(layer.named_modules())
        return [
            Problem(
                "no such submodule",
                got=name,
                allowed=", ".join(filter(None, known)),
                hint=nearest(name, known),
            )
            for name in (*self.pre, *self.core, *self.post)
            if name not in known
        ]

    def watch(self, layer: nn.Module, tape: Callable[[], Tape | None]) -> list[RemovableHandle]:
        """Tell the tape of the layer that runs when one of the submodules does."""
        handles: list[RemovableHandle] = []
        for name in (*self.pre, *self.core, *self.post):
            module, is_core = layer.get_submodule(name), name in self.core
            handles += [
                module.register_forward_pre_hook(_mark(tape, 1, is_core=is_core)),
                module.register_forward_hook(_mark(tape, -1, is_core=is_core), always_call=True),
            ]
        return handles


def _mark(tape: Callable[[], Tape | None], by: int, *, is_core: bool) -> Callable[..., None]:
    def mark(*_: Any) -> None:
        writing = tape()
        if writing is not None and is_core:
            writing.core_depth += by
        elif writing is not None:
            writing.trusted_depth += by

    return mark
