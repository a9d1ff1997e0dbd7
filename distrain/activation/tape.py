"""Writes down what a layer computes while it computes it.

A mode below autograd sees every operator with its tensors. Memory is known by its storage: an output in a storage that
no argument has is new, and takes the place of whatever was at that address before. Nothing is kept alive by writing,
but constants: tensors from outside that are neither parameters nor inputs (rotary tables), which somebody else holds.

What was changed in place, but in one step as a whole, is not followed: its values count as unknown from then on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .program import Draw, Group, Node, Origin, Program, Ref, generator_state, tensors_in
from .storage import Window, taken_apart

FILLS = frozenset(
    f"{name}_"
    for name in (
        "bernoulli",
        "uniform",
        "normal",
        "exponential",
        "random",
        "geometric",
        "cauchy",
        "zero",
        "fill",
    )
)
LIKES = frozenset(
    [f"{name}_like" for name in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")]
    + [f"new_{name}" for name in ("empty", "zeros", "ones", "full", "empty_strided")]
)
NEVER_AGAIN = frozenset(
    ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit")
)
"""operators that change running statistics without saying so"""
CALLS = frozenset(("alltoall_base_", "_allgather_base_", "_reduce_scatter_base_"))
"""collectives that fill their first argument, without saying so, and leave the others as they are"""


@dataclass(slots=True)
class Memory:
    """One storage that the layer has met."""

    address: int
    base: int
    """the value that made it, or the first one seen in it"""
    is_new: bool
    """made by the layer"""
    from_data: bool
    """made from inputs or random numbers, not from parameters and constants alone"""
    values: dict[Window, int] = field(default_factory=dict)
    spoiled: bool = False
    """changed in place in a way that cannot be done again"""


class Tape(TorchDispatchMode):
    """Records one forward of one layer.

    ``named`` are its parameters and buffers, ``inputs`` the tensors that it is given and that carry activations.
    """

    def __init__(self, named: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = False
        """set while somebody works with tensors without being part of the layer"""
        self.core_depth = 0
        """how many declared cores are running: what they compute is never recomputed"""
        self.constants: list[Tensor] = []
        """as they came, wrappers and all: a view that is made below autograd does not share the counter of changes"""
        self.seeds: list[Draw] = []
        self.readable = True
        """False once something was met that cannot be written down"""
        self.trusted_depth = 0
        """how many modules are running that are token-local by declaration"""
        self.cores: set[int] = set()
        """nodes that are never done again"""
        self.trusted: set[int] = set()
        """nodes that are token-local by declaration"""
        self._memory: dict[int, Memory] = {}
        self._nodes: list[Node] = []
        self._windows: list[Window] = []
        self._by_value: list[Memory] = []
        self._origins: list[tuple[int, Origin]] = []
        for name, tensor in named.items():
            inner, _ = taken_apart(tensor)
            if inner is not None:
                self._outside(inner, Origin("param", name))
        for number, tensor in enumerate(inputs):
            inner, _ = taken_apart(tensor)
            if inner is not None:
                self._outside(inner, Origin("input", number))

    def memory_of(self, tensor: Tensor) -> Memory | None:
        """What is known of the storage of a plain ``tensor``."""
        storage = tensor.untyped_storage()
        memory = self._memory.get(storage._cdata)
        return memory if memory is not None and memory.address == storage.data_ptr() else None

    def program(self) -> Program:
        """What was written so far."""
        return Program(tuple(self._nodes), tuple(self._windows), tuple(self._origins))

    def spoiled_values(self) -> set[int]:
        """Values whose memory was changed in a way that cannot be done again."""
        return {value for value, memory in enumerate(self._by_value) if memory.spoiled}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator and write it down."""
        kwargs = kwargs or {}
        if self.paused or not self.readable:
            return func(*args, **kwargs)
        refs: list[Ref] = []
        refs_args = tuple([self._encoded(each, refs) for each in args])
        refs_kwargs = tuple([(name, self._encoded(each, refs)) for name, each in kwargs.items()])
        seed = self._seed(func, args, kwargs)
        result = func(*args, **kwargs)
        self._write(func, refs_args, refs_kwargs, tuple(refs), seed, result)
        return result

    def _encoded(self, argument: Any, refs: list[Ref]) -> Any:
        """``argument`` with values in place of tensors; these are added to ``refs``."""
        if isinstance(argument, Tensor):
            ref = self._ref(argument)
            refs += [] if ref is None else [ref]
            return ref
        if isinstance(argument, (list, tuple)):
            return tuple([self._encoded(each, refs) for each in argument])
        if isinstance(argument, torch.ScriptObject):
            return _unboxed(argument)
        if isinstance(argument, torch.Generator):
            self.readable = False
        return argument

    def _ref(self, tensor: Tensor) -> Ref | None:
        inner, wrap = taken_apart(tensor)
        if inner is None:
            self.readable = False
            return None
        memory = self.memory_of(inner)
        if memory is None:
            self.constants.append(tensor)
            memory = self._outside(inner, Origin("constant", len(self.constants) - 1))
        window = Window.of(inner)
        value = memory.values.get(window)
        if value is None:
            value = self._unseen(tensor, memory, window)
        return Ref(value, wrap)

    def _unseen(self, tensor: Tensor, memory: Memory, window: Window) -> int:
        """A view that was made elsewhere, or by other means than an operator."""
        origin = Origin("unknown", None)
        if not (memory.is_new or memory.spoiled or memory.from_data):
            self.constants.append(tensor)
            origin = Origin("constant", len(self.constants) - 1)
        self._origins.append((len(self._windows), origin))
        return self._value(memory, window)

    def _outside(self, inner: Tensor, origin: Origin) -> Memory:
        storage = inner.untyped_storage()
        memory = self.memory_of(inner)
        if memory is None:
            is_input = origin.kind == "input"
            memory = Memory(storage.data_ptr(), len(self._windows), is_new=False, from_data=is_input)
            self._memory[storage._cdata] = memory
        window = Window.of(inner)
        if window not in memory.values:
            self._origins.append((self._value(memory, window), origin))
        return memory

    def _value(self, memory: Memory, window: Window) -> int:
        number = len(self._windows)
        self._windows.append(window)
        self._by_value.append(memory)
        memory.values[window] = number
        return number

    def _seed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        like = next((each.device for each in args if isinstance(each, Tensor)), "cpu")
        device = torch.device(kwargs.get("device") or like)
        self.seeds.append(Draw(device, generator_state(device)))
        return len(self.seeds) - 1

    def _write(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: tuple[tuple[str, Any], ...],
        refs: tuple[Ref, ...],
        seed: int | None,
        result: Any,
    ) -> None:
        node = Node(func, args, kwargs, (), seed, False, func._schema.is_mutable, refs)
        name = node.name
        node = node._replace(blank=name in FILLS or name in LIKES)
        memories = [self._by_value[ref.value] for ref in refs]
        if node.is_call:
            self._call(node, name, memories)
            return
        read = memories[1:] if node.blank else memories
        from_data = seed is not None or any(each.from_data for each in read)
        if node.mutates:
            self._mutate(node, memories, from_data=from_data)
        before = len(self._windows)
        outs = tuple([self._result(each, memories, from_data=from_data) for each in tensors_in(result)])
        if len(self._windows) > before:
            if self.core_depth or name in NEVER_AGAIN:
                self.cores.add(len(self._nodes))
            if self.trusted_depth:
                self.trusted.add(len(self._nodes))
            self._nodes.append(node._replace(outs=outs))

    def _call(self, node: Node, name: str, memories: list[Memory]) -> None:
        """A collective, which changes tensors that it was given."""
        filled = node.args[0]
        alone = name in CALLS and isinstance(filled, Ref) and self._is_alone(memories[0], filled.value)
        for memory in memories[: 1 if name in CALLS else None]:
            memory.spoiled |= not alone
            memory.from_data |= any(each.from_data for each in memories)
            memory.values.clear()
        if alone:
            memories[0].base = self._value(memories[0], self._windows[filled.value])
            self._nodes.append(node._replace(outs=(memories[0].base,)))

    def _is_alone(self, memory: Memory, value: int) -> bool:
        """Whether ``value`` is all that anybody sees of a memory that the layer made."""
        return memory.is_new and len(memory.values) == 1 and memory.base == value

    def _mutate(self, node: Node, memories: list[Memory], *, from_data: bool) -> None:
        """An operator that writes to its first argument can be done again if nothing else looks at that memory."""
        arguments = node.func._schema.arguments
        written = [i for i, each in enumerate(arguments) if each.alias_info and each.alias_info.is_write]
        first = node.args[0] if node.args and isinstance(node.args[0], Ref) else None
        if written == [0] and first is not None:
            memories = memories[:1]
        for memory in memories:
            if first is None or written != [0] or not self._is_alone(memory, first.value):
                memory.spoiled = True
            memory.from_data |= from_data
            memory.values.clear()

    def _result(self, tensor: Tensor | None, memories: list[Memory], *, from_data: bool) -> int | None:
        """The value that ``tensor`` is: a new one, unless the operator gave an argument back."""
        inner = None if tensor is None else taken_apart(tensor, arrived=False)[0]
        if inner is None:
            self.readable &= tensor is None
            return None
        memory = self.memory_of(inner)
        if memory is None or not any(memory is each for each in memories):
            storage = inner.untyped_storage()
            memory = Memory(storage.data_ptr(), len(self._windows), is_new=True, from_data=from_data)
            self._memory[storage._cdata] = memory
        window = Window.of(inner)
        known = memory.values.get(window)
        if known is not None:
            return known
        if not memory.values:
            memory.base = len(self._windows)
        return self._value(memory, window)


def _unboxed(argument: torch.ScriptObject) -> Any:
    try:
        return Group(dist.ProcessGroup.unbox(argument))
    except RuntimeError:
        return argument
