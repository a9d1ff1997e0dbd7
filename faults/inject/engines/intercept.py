"""The one seam on torch.distributed: every collective of this process passes through a function of ours.

However a collective is issued (``torch.distributed``, functional collectives, DTensor, FSDP2, DDP's reducer), it goes
through an operator of torch's library ``c10d``. ``torch.library`` lets a kernel be put in front of an operator's own
and taken away again; nothing of torch is patched, and a process without such faults has nothing in between. A native
recorder can take this place later: what faults are written against is ``Around`` and ``core``'s ``CollectiveHook``.
"""

import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (  # type: ignore[attr-defined]  # missing in torch's stubs
    _create_work_from_future as create_work,
)

from distrain.core.failpoints import hit
from distrain.core.protocols import CollectiveCall, CollectiveHook

from .steps import IN_COLLECTIVE_POINT

OPERATORS: Mapping[str, str] = MappingProxyType(
    {
        "allreduce_": "all_reduce",
        "allreduce_coalesced_": "all_reduce",
        "allgather_": "all_gather",
        "_allgather_base_": "all_gather",
        "allgather_coalesced_": "all_gather",
        "allgather_into_tensor_coalesced_": "all_gather",
        "reduce_scatter_": "reduce_scatter",
        "_reduce_scatter_base_": "reduce_scatter",
        "reduce_scatter_tensor_coalesced_": "reduce_scatter",
        "alltoall_": "all_to_all",
        "alltoall_base_": "all_to_all",
        "broadcast_": "broadcast",
        "reduce_": "reduce",
        "gather_": "gather",
        "scatter_": "scatter",
        "barrier": "barrier",
        "send": "send",
        "recv_": "recv",
        "recv_any_source_": "recv",
    }
)
"""operators of c10d by the names that ``CollectiveCall`` has for them"""


KEPT = 64
"""collectives whose tensors are kept on the CPU. A kernel is called with the interpreter's lock held, which a thread of
gloo wants when it leaves Python alone with a tensor, with a lock in its hands for which the kernel waits. Groups and
works are not kept: gloo's threads would outlive ``destroy_process_group``, and abort an interpreter that ends"""


class Issue:
    """Issues one collective; what it returns is what the operator does, with ``wait`` not called yet."""

    def __init__(
        self, operator: str, kernel: Any, keyset: torch._C.DispatchKeySet, kept: "deque[Any]"
    ) -> None:
        self._schema = getattr(torch.ops.c10d, operator).default._schema
        self._kernel, self._keyset, self._kept = kernel, keyset, kept

    def __call__(self, *arguments: Any) -> Any:
        """Issue it with these arguments of its operator."""
        result = self._kernel.call_boxed(self._keyset, *arguments)
        if tensors := [tensor for argument in arguments for tensor in tensors_in(argument)]:
            self._kept.append(torch._C.ScriptList(tensors))  # references that are not Python's
        return result

    def is_async(self, arguments: Sequence[Any]) -> bool:
        """Whether the caller goes on before the result is there; torch leaves the default, true, out."""
        names = [each.name for each in self._schema.arguments]
        if "async_op" not in names:
            return False
        place = names.index("async_op")
        return place >= len(arguments) or bool(arguments[place])

    def result(self, arguments: Sequence[Any], *, done: "torch.futures.Future[list[Tensor]]") -> Any:
        """What the operator would return if its work were over when ``done`` is."""
        work = create_work(done).boxed()
        return work if len(self._schema.returns) == 1 else (arguments[0], work)


Around = Callable[[CollectiveCall, Sequence[Any], Issue], Any]
"""stands around a collective: gets the call, the operator's arguments, and what issues it; returns as the operator"""


def intercept(around: Around, stack: ExitStack) -> None:
    """Let ``around`` stand around every collective of this process until ``stack`` is closed.

    What is put around later stands further outside.
    """
    library = torch.library.Library("c10d", "IMPL")
    stack.callback(library._destroy)
    sequences: Counter[str] = Counter()
    keys = ["CPU", *(["CUDA"] if torch.cuda.is_available() else [])]
    kept: dict[str, deque[Any]] = {key: deque(maxlen=KEPT if key == "CPU" else 0) for key in keys}
    for tensors in kept.values():
        stack.callback(tensors.clear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that there is a kernel already: that is the point
        for operator in OPERATORS:
            place = _group_argument(operator)
            for key in keys:
                kernel = torch.library.get_kernel(f"c10d::{operator}", key)
                ours = partial(_pass, kernel, around, operator, place, sequences, kept[key])
                library.impl(operator, ours, key, with_keyset=True)


def through(hook: CollectiveHook) -> Around:
    """``Around`` that enters ``hook``'s context."""

    def around(call: CollectiveCall, arguments: Sequence[Any], issue: Issue) -> Any:
        with hook.collective(call):
            return issue(*arguments)

    return around


def watch_collectives(stack: ExitStack) -> None:
    """Pass a failpoint inside each collective, for faults that are to happen there."""
    intercept(through(_Inside()), stack)


class _Inside:
    """Passes ``IN_COLLECTIVE_POINT`` when a collective has been issued and its caller does not know yet."""

    @contextmanager
    def collective(self, call: CollectiveCall) -> Iterator[None]:
        yield
        hit(IN_COLLECTIVE_POINT, call=call)


def _pass(
    kernel: Any,
    around: Around,
    operator: str,
    place: int,
    sequences: "Counter[str]",
    kept: "deque[Any]",
    keyset: torch._C.DispatchKeySet,
    *arguments: Any,
) -> Any:
    """Our kernel: the operator's own, and ``around`` around it."""
    group = dist.ProcessGroup.unbox(arguments[place]).group_name
    call = CollectiveCall(
        name=OPERATORS[operator],
        group=group,
        sequence=sequences[group],
        num_bytes=sum(tensor.nbytes for tensor in tensors_in(arguments[0])),
    )
    sequences[group] += 1
    return around(call, arguments, Issue(operator, kernel, keyset, kept))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an operator's argument: one, a list, or a list of lists."""
    if isinstance(value, Tensor):
        return [value]
    return (
        [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []
    )


def _group_argument(operator: str) -> int:
    """The place of the process group among the arguments."""
    schema = getattr(torch.ops.c10d, operator).default._schema
    return next(place for place, each in enumerate(schema.arguments) if each.name == "process_group")
