"""Which tensors a module makes, how large they are and how long they live: traced without memory and without a GPU.

The module runs forward and backward on fake tensors, which know shapes and compute nothing, so a 7B layer at a million
tokens takes a second. A dispatch mode counts operators, the ticks of the trace; a storage is born when an operator
returns it and dies when the last tensor, or autograd, lets go of it::

    tick      1    2    3    4  |  5    6    7
    norm out  [=================|======)            skeletal: made in forward, read in backward
    qkv out        [===)        |                   transient: never seen by backward
    grad                        |  [====)           transient of the backward
                            forward_end

MEMO (2407.12117, section 3) patches the allocator and runs one layer on a GPU for this.

Devices: fakes of CUDA tensors cannot run backward on a torch without CUDA, so modules are traced as on a CPU. The sizes
are the same, with one exception: a CUDA kernel may ask for workspace of its own. Where a GPU is at hand,
``snapshot.py`` reads what its allocator recorded.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from distrain.planners.buffers import Buffer


@dataclass(frozen=True, slots=True)
class TracedTensor:
    """One storage: ``num_bytes`` from tick ``birth`` to just before ``death``."""

    op: str
    """the operator that made it"""
    shape: tuple[int, ...]
    num_bytes: int
    birth: int
    death: int


@dataclass(frozen=True, slots=True)
class Trace:
    """All storages that operators made, in the order of their births. Parameters and their gradients are not traced."""

    tensors: tuple[TracedTensor, ...]
    inputs: tuple[TracedTensor, ...]
    """what was given to the module"""
    outputs: tuple[TracedTensor, ...]
    """what the module returned: the next one's inputs; alive at the end of forward whoever needs them"""
    gradients: tuple[TracedTensor, ...]
    """what backward was given, and what it left: the gradients of inputs"""
    forward_end: int
    """the last tick of forward"""
    end: int
    """the last tick"""

    @property
    def skeletal(self) -> tuple[TracedTensor, ...]:
        """What forward leaves for backward: inputs that backward reads, and what was made for it."""
        made = (each for each in self.tensors if each not in self.outputs)
        between = self.forward_end + 1
        return tuple(each for each in (*self.inputs, *made) if each.birth < between < each.death)

    @property
    def skeletal_bytes(self) -> int:
        """Bytes that one call of the module keeps until its backward."""
        return sum(each.num_bytes for each in self.skeletal)

    def transients(self, *, backward: bool) -> tuple[Buffer, ...]:
        """What lives and dies inside forward or inside backward, as buffers to be planned; ticks from 0."""
        start, end = (self.forward_end, self.end) if backward else (0, self.forward_end)
        others = {*self.outputs, *self.gradients}
        chosen = [
            each
            for each in self.tensors
            if start < each.birth and each.death <= end + 1 and each not in others
        ]
        return tuple(
            Buffer(f"{each.op}.{number}", each.birth - start - 1, each.death - start - 1, each.num_bytes)
            for number, each in enumerate(chosen)
            if each.num_bytes
        )

    def buffers(self) -> tuple[Buffer, ...]:
        """Everything that operators made, as buffers."""
        return tuple(
            Buffer(f"{each.op}.{number}", each.birth, each.death, each.num_bytes)
            for number, each in enumerate(self.tensors)
            if each.num_bytes
        )


def trace_module(
    module: nn.Module, *inputs: Any, loss: Callable[[Any], Tensor] | None = None, requires_grad: bool = True
) -> Trace:
    """Forward and backward of ``module(*inputs)``; nothing is computed and nothing of ``module`` is changed.

    Args:
        module: any; its parameters may be real, fake, or on the meta device.
        inputs: tensors, or trees of them; only their shapes and dtypes count.
        loss: what backward starts from; by default gradients of the output's shape are given, as by a next layer.
        requires_grad: whether floating-point inputs need gradients, as all but the first layer's do.
    """
    with FakeTensorMode() as mode, _faked(module, mode):
        given = tree_map_only(Tensor, lambda each: _fake(each, requires_grad), inputs)
        recorder = _Recorder()
        with recorder:
            recorder.watch_inputs(given)
            output = module(*given)
            del given
            recorder.watch_outputs(output)
            if loss is not None:
                output = loss(output)
            recorder.forward_end = recorder.tick
            ends = [each for each in tree_leaves(output) if isinstance(each, Tensor) and each.requires_grad]
            gradients = [torch.ones_like(end) for end in ends]
            recorder.watch_gradients(gradients)
            torch.autograd.backward(ends, gradients)
            del output, ends, gradients
        return recorder.result()


def _fake(tensor: Tensor, requires_grad: bool) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return fake.requires_grad_(requires_grad and fake.is_floating_point())


@contextmanager
def _faked(module: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """``module`` with fake parameters and buffers, and gradients that are there already, as from a step before."""
    stand_ins: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in stand_ins:
            fake = _fake(tensor, False)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                fake.grad = torch.empty_like(fake) if tensor.requires_grad else None
            stand_ins[id(tensor)] = fake
        return stand_ins[id(tensor)]

    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for each in module.modules():
            tables: tuple[dict[str, Any], ...] = (each._parameters, each._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None:
                        kept.append((table, name, tensor))
        for table, name, tensor in kept:
            table[name] = stand_in(tensor)
        yield
    finally:
        for table, name, tensor in kept:
            table[name] = tensor


class _Recorder(TorchDispatchMode):
    """Counts operators, and watches the storages that they return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tick = 0
        self.forward_end = 0
        self._births: list[tuple[str, tuple[int, ...], int, int]] = []
        self._deaths: dict[int, int] = {}
        self._living: dict[int, int] = {}
        self._inputs: list[int] = []
        self._outputs: list[int] = []
        self._gradients: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        self.tick += 1
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and _storage(each) not in given:
                self._watch(each, str(func).removeprefix("aten."))
        return result

    def watch_inputs(self, inputs: Any) -> None:
        """``inputs`` are there before the first operator."""
        for each in tree_leaves(inputs):
            if isinstance(each, Tensor):
                self._inputs.append(self._watch(each, "input"))

    def watch_outputs(self, outputs: Any) -> None:
        """``outputs`` are what the module returned."""
        for each in tree_leaves(outputs):
            if isinstance(each, Tensor) and _storage(each) in self._living:
                self._outputs.append(self._living[_storage(each)])

    def watch_gradients(self, gradients: Any) -> None:
        """``gradients`` are what backward is given."""
        self._gradients += [self._living[_storage(each)] for each in gradients]

    def _watch(self, tensor: Tensor, op: str) -> int:
        key = _storage(tensor)
        if key not in self._living:
            self._living[key] = len(self._births)
            storage = tensor.untyped_storage()
            self._births.append((op, tuple(tensor.shape), storage.nbytes(), self.tick))
            finalize(storage, self._die, key)
        return self._living[key]

    def _die(self, key: int) -> None:
        self._deaths[self._living.pop(key)] = self.tick + 1

    def result(self) -> Trace:
        """What was recorded; what still lives, such as gradients of inputs, lives to the end."""
        last = self.tick + 1
        tensors = [
            TracedTensor(op, shape, size, birth, max(birth + 1, self._deaths.get(index, last)))
            for index, (op, shape, size, birth) in enumerate(self._births)
        ]
        inputs = set(self._inputs)
        left = [index for index in self._living.values() if tensors[index].birth > self.forward_end]
        return Trace(
            tensors=tuple(each for index, each in enumerate(tensors) if index not in inputs),
            inputs=tuple(tensors[index] for index in sorted(inputs)),
            outputs=tuple(tensors[index] for index in self._outputs if index not in inputs),
            gradients=tuple(tensors[index] for index in sorted({*self._gradients, *left})),
            forward_end=self.forward_end,
            end=self.tick,
        )


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
