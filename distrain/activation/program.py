"""What a layer computed, as data: operators on numbered values.

Below autograd and autocast a layer's forward is a straight line of operators, whatever Python led to it. Written
down it says how each tensor can be made again: for all tokens or for some of them, without the layer's code, which
would count positions from zero and draw other random numbers::

    0 input 0        1 param attn_norm.weight        2 constant (the cosines of the rotary embedding)
    3 = mul(0, 1)    4 = mm(view(3), t(5))  ...

A program holds no tensors, so equal layers have equal programs and what is found out about one serves all.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .storage import Window, Wrap


class Ref(NamedTuple):
    """An argument that is a value, in its wrapper if it has one."""

    value: int
    wrap: Wrap | None = None


class Group(NamedTuple):
    """An argument that is a process group, which comes in a new box each time."""

    group: dist.ProcessGroup


class Origin(NamedTuple):
    """A value that no operator of the layer made."""

    kind: str
    """input, param (parameter or buffer), constant, unknown"""
    key: Any
    """number of the input or the constant, name of the parameter"""


class Node(NamedTuple):
    """One operator call."""

    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outs: tuple[int | None, ...]
    """values, in the order of the tensors among the results"""
    seed: int | None
    """number of the generator state before the call, if it draws"""
    blank: bool
    """whether of its first argument only the form matters: it is filled, or something is made like it"""
    mutates: bool
    refs: tuple[Ref, ...]
    """arguments that are values, in order"""

    @property
    def name(self) -> str:
        """Of the operator, without its namespace and overload."""
        return str(self.func._schema.name.rpartition("::")[2])

    @property
    def is_call(self) -> bool:
        """Whether it is a collective that fills its first argument and returns work to wait for."""
        return bool(self.func.namespace == "c10d")

    @property
    def group_name(self) -> str | None:
        """Of the process group whose ranks do it together; None if it is no collective."""
        if self.is_call:
            return next((each.group.group_name for each in self.args if isinstance(each, Group)), "")
        if not self.func.namespace.startswith("_c10d_functional") or self.name == "wait_tensor":
            return None
        return next((each for each in reversed(self.args) if isinstance(each, str)), "")


class Draw(NamedTuple):
    """Where a generator was before an operator drew from it."""

    device: torch.device
    state: Tensor


class Program(NamedTuple):
    """A layer's forward."""

    nodes: tuple[Node, ...]
    windows: tuple[Window, ...]
    """of each value"""
    origins: tuple[tuple[int, Origin], ...]


def tensors_in(result: Any) -> list[Tensor | None]:
    """The results of an operator, one by one; None for what is no tensor."""
    results = result if isinstance(result, (tuple, list)) else (result,)
    flat: list[Tensor | None] = []
    for each in results:
        if isinstance(each, (tuple, list)):
            flat += tensors_in(each)
        else:
            flat.append(each if isinstance(each, Tensor) else None)
    return flat


def generator_state(device: torch.device) -> Tensor:
    """Of the generator that operators on ``device`` draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(state: Tensor, device: torch.device) -> None:
    """Let operators on ``device`` draw from ``state`` on."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
