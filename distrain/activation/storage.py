"""Tensors as memory: which storage one lies in, where in it, and how to look at a storage again in the same way.

Autograd saves views. Query, key and value may be slices of one matrix, and a transpose is the same memory read in
another order, so the unit of saving is the storage, and each saved tensor is a window on it: two tensors share memory
if they share a storage, and are equal only if they also share shape, stride, offset, type, and the two bits by which
torch conjugates or negates without touching memory. (Offloaders that took the pointer alone for the key handed back a
tensor in place of its transpose.) A storage is known by its address, which is only meaningful while somebody keeps it
alive.

Wrappers such as DTensor hold one plain tensor; they are taken apart here and put together again around another one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ALIGNMENT = 512
"""bytes; of everything that shares one allocation"""


class Window(NamedTuple):
    """How a tensor looks at its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    conjugated: bool = False
    negated: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> "Window":
        """The window that ``tensor`` is."""
        return cls(
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.is_conj(),
            tensor.is_neg(),
        )

    def on(self, storage: torch.UntypedStorage, shift_bytes: int = 0) -> Tensor:
        """The tensor that looks in this way at ``storage`` from ``shift_bytes`` on."""
        blank = torch.empty(0, dtype=self.dtype, device=storage.device)
        offset = self.offset + shift_bytes // self.dtype.itemsize
        return self.read(blank.set_(storage, offset, self.shape, self.stride))

    def read(self, tensor: Tensor) -> Tensor:
        """What lies in memory as ``tensor``, conjugated or negated if this window is."""
        tensor = torch._conj(tensor) if self.conjugated else tensor
        return torch._neg_view(tensor) if self.negated else tensor

    @property
    def num_bytes(self) -> int:
        """Of the elements, were none of them shared."""
        number = self.dtype.itemsize
        for size in self.shape:
            number *= size
        return number

    def covers(self, num_bytes: int) -> bool:
        """Whether it is all of a storage of ``num_bytes``, each element once."""
        if self.offset or self.num_bytes != num_bytes or self.conjugated or self.negated:
            return False
        expected = 1
        for dim in reversed(self.order):
            if self.shape[dim] != 1 and self.stride[dim] != expected:
                return False
            expected *= self.shape[dim]
        return True

    @property
    def order(self) -> list[int]:
        """Dims from the outermost in memory to the innermost."""
        return sorted(range(len(self.shape)), key=lambda dim: (-self.stride[dim], -self.shape[dim], dim))


class Wrap(NamedTuple):
    """What makes a wrapper subclass of a plain tensor."""

    kind: Any
    name: str
    """attribute that holds the plain tensor"""
    others: tuple[tuple[str, Any], ...]
    """attributes that hold something else, such as a device mesh"""
    context: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    inner_shape: tuple[int, ...]

    def around(self, inner: Tensor) -> Tensor:
        """The wrapper around ``inner``, whose dims may have grown or shrunk in proportion."""
        shape = [
            size if mine == whole else size * mine // whole
            for size, mine, whole in zip(self.shape, inner.shape, self.inner_shape, strict=True)
        ]
        stride = self.stride
        if tuple(shape) != self.shape:
            stride = torch.empty(shape, device="meta").stride()
        wrapped: Tensor = self.kind.__tensor_unflatten__(
            {self.name: inner, **dict(self.others)}, self.context, torch.Size(shape), stride
        )
        return wrapped


def taken_apart(tensor: Tensor, *, arrived: bool = True) -> tuple[Tensor | None, Wrap | None]:
    """The plain tensor in ``tensor`` and its wrapper, if it has one; None for what is more than one plain tensor.

    What a collective is still bringing is waited for, unless it only has to be known (not ``arrived``).
    """
    if type(tensor) is Tensor or not is_traceable_wrapper_subclass(tensor):
        is_plain = tensor.layout is torch.strided and not tensor.is_nested
        return (tensor, None) if is_plain else (None, None)
    if isinstance(tensor, AsyncCollectiveTensor):
        return taken_apart(tensor.trigger_wait() if arrived else tensor.elem, arrived=arrived)
    names, context = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    name, *more = [name for name, part in parts.items() if isinstance(part, Tensor)]
    inner, within = (None, None) if more else taken_apart(parts[name], arrived=arrived)
    if inner is None or within is not None:
        return None, None
    others = tuple((each, part) for each, part in parts.items() if each != name)
    shape, stride = tuple(tensor.shape), tensor.stride()
    return inner, Wrap(type(tensor), name, others, context, shape, stride, tuple(inner.shape))


def aligned(num_bytes: int) -> int:
    """``num_bytes`` rounded up to ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class VersionGuard:
    """Tells whether memory was changed in place since, without keeping it.

    Views share a counter of changes. The guard is one more view whose memory was taken away, so that it still counts.
    torch itself does not look at the counter once saved tensors have hooks. A wrapper has a counter of its own, which
    is the one that counts what is done to the wrapper; that of the tensor in it counts the rest. What is done to
    ``tensor.data`` nobody counts.
    """

    __slots__ = ("_guarded", "_home")

    def __init__(self, tensor: Tensor) -> None:
        inner, wrap = taken_apart(tensor)
        self._home = None if inner is None else inner.untyped_storage()._cdata
        self._guarded: list[tuple[Tensor, int]] = []
        if wrap is not None:
            view = tensor.detach()
            setattr(view, wrap.name, torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            self._guarded.append((view, tensor._version))
        if inner is not None and not inner.is_inference():
            view = inner.detach()
            view.data = torch.empty(0, dtype=inner.dtype, device=inner.device)
            self._guarded.append((view, inner._version))

    def check(self, window: Window, *, now: Tensor | None = None, hint: str = "") -> None:
        """Raise RuntimeError, as torch does without hooks, if the tensor was changed, or is ``now`` in other memory."""
        for view, version in self._guarded:
            self.compare(view, version, window, hint=hint)
        if now is not None and now.untyped_storage()._cdata != self._home:
            raise RuntimeError(
                "one of the variables needed for gradient computation was given other memory: "
                f"[{window.dtype} {list(window.shape)}]{hint}"
            )

    @staticmethod
    def compare(tensor: Tensor, version: int, window: Window, *, hint: str = "") -> None:
        """Raise RuntimeError if the memory of ``tensor`` is not at ``version`` any more."""
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{window.dtype} {list(window.shape)}] is at version {tensor._version}; "
                f"expected version {version} instead{hint}"
            )
