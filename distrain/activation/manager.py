"""Keeps, swaps or recomputes what the layers of a model save for backward, token by token, as a plan says.

::

    with ActivationManager(model.layers, plan) as manager:
        loss = model(batch)
        loss.backward()
    print(manager.report())

Gradients are those of the unmanaged layers to the bit, or backward raises: what saved tensors are made again from
(masks, biases, inputs) may not be changed in place before it, even where torch alone would not mind. What a layer
saves is caught by saved-tensor hooks, how it was computed is written down by a mode below autograd (``tape``), and
what works token by token is found by trying (``locality``); so any module will do. A layer that does something which
cannot be written down, cut or made again is swapped or kept as a whole instead, and counted.

MEMO (2407.12117) is the model: inputs and attention are swapped whole, of the other tensors a share of the tokens, and
the rest is recomputed in one go before the layer's backward, which itself is not split. Ours keeps what fits, and
recomputes without the layer's last matrix product and for any layer.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from distrain.core.device import Device, open_device
from distrain.core.errors import DistrainError, Problem, raise_if
from distrain.planners.activation_plan import ActivationPlan, LayerPlan

from .agreement import agree_on
from .engine import Engine
from .frame import Frame
from .host_pool import HostPool
from .ledger import ActivationReport
from .segments import TokenSegments
from .settle import settle
from .storage import taken_apart
from .tape import Tape

AUTO = "auto"


@dataclass(slots=True)
class _Open:
    """A layer that is running; without a frame if it is left alone."""

    layer: nn.Module
    thread: int
    frame: Frame | None = None
    plan: LayerPlan | None = None
    num_tokens: int = 0
    hooks: saved_tensors_hooks | None = None


class ActivationManager:
    """Manages the activations of ``layers``, each under the plan at its place in ``plan``.

    ``segments`` is "auto", or what every layer declares of itself. Tokens are dim ``token_dim`` of the first tensor
    that a layer is given. Ranks of each of ``groups`` compute their layers together (tensor and sequence parallelism);
    they must have the same plan, which is checked once. One manager serves any number of steps and micro-batches; it
    is a ``MicrobatchHooks``, and knows then which backward of a pipeline comes next.

    Raises:
        ConfigError: the plan is for another number of layers, or a declared module does not exist.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        plan: ActivationPlan,
        *,
        segments: str | TokenSegments = AUTO,
        device: Device | None = None,
        token_dim: int = 1,
        groups: Sequence[dist.ProcessGroup] = (),
    ) -> None:
        self._layers = list(layers)
        self._plan = plan
        self._segments = None if isinstance(segments, str) else segments
        self._token_dim = token_dim
        self._groups = groups
        _check(self._layers, plan, segments)
        self.device = device or _device_of(self._layers)
        self._engine = Engine(self.device, HostPool(self.device, limit_bytes=plan.host_bytes), groups=groups)
        self._handles: list[RemovableHandle] = []
        self._open: list[_Open] = []
        self._newest: ref[Frame] | None = None
        self._last_of: dict[tuple[int, int], ref[Frame]] = {}
        self._is_agreed = False

    def __enter__(self) -> "ActivationManager":
        if self._handles:
            raise DistrainError(
                "this activation manager is at work already", hint="leave its with block first"
            )
        if not self._is_agreed:
            agree_on(self._plan.digest, self._groups)
            self._is_agreed = True
        for index, layer in enumerate(self._layers):
            self._handles += [
                # Innermost on both sides: between them the weights of a sharded layer are whole.
                layer.register_forward_pre_hook(_as_it_is(self._begin(index)), with_kwargs=True),
                layer.register_forward_hook(
                    _as_it_is(self._end), prepend=True, with_kwargs=True, always_call=True
                ),
            ]
            if self._segments is not None:
                self._handles += self._segments.watch(layer, self._tape)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            self._close(self._open.pop())
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._newest = None
        self._last_of.clear()
        self._engine.traffic.close()

    def reserve_host(self, num_bytes: int) -> None:
        """Pin host memory ahead, so that the first step need not."""
        self._engine.pool.reserve(num_bytes)

    def report(self) -> ActivationReport:
        """What happened since the last report.

        Raises:
            DistrainError: host memory is held that no graph will give back.
        """
        return self._engine.report()

    @contextmanager
    def around(self, op: str, stage: int, micro_batch: int, *, last: bool) -> Iterator[None]:
        """Keep the micro-batches of a pipeline apart; see MicrobatchHooks."""
        if op == "F":
            self._newest = None
            yield
            if self._newest is not None:
                self._last_of[stage, micro_batch] = self._newest
        else:
            newest = self._last_of.get((stage, micro_batch))
            self._engine.prefetch(None if newest is None else newest())
            yield

    def _begin(self, index: int) -> Any:
        plan = self._plan.layers[index]

        def begin(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            thread = threading.get_ident()
            if self._open and self._open[-1].thread != thread:
                raise DistrainError(
                    "two threads run layers of one activation manager at a time",
                    hint="give each thread layers and a manager of its own",
                )
            self._open.append(_Open(layer, thread))
            if torch.is_grad_enabled() and not plan.keeps_all:
                self._record(self._open[-1], index, plan, (args, kwargs))

        return begin

    def _record(self, opened: _Open, index: int, plan: LayerPlan, given: Any) -> None:
        """Let a frame catch what the layer saves, and its tape write down what it does."""
        tensors = [each for each in tree_leaves(given) if isinstance(each, Tensor)]
        inputs = [each for i, each in enumerate(tensors) if i == 0 or each.requires_grad]
        num_tokens = self._num_tokens(inputs)
        ledger = self._engine.ledger
        ledger.num_layers += 1
        if num_tokens is None:
            ledger.num_unreadable += 1
            return
        ledger.num_other_lengths += num_tokens != plan.num_tokens
        self._engine.traffic.let_go()
        frame = Frame(self._engine, opened.layer, inputs, index=index, previous=self._newest or _nothing)
        opened.frame, opened.plan, opened.num_tokens = frame, plan.at(num_tokens), num_tokens
        opened.hooks = saved_tensors_hooks(frame.pack, lambda saved: saved.tensor())
        opened.hooks.__enter__()
        frame.tape.__enter__()  # type: ignore[no-untyped-call]

    def _num_tokens(self, inputs: Sequence[Tensor]) -> int | None:
        inner = taken_apart(inputs[0])[0] if inputs else None
        return inner.shape[self._token_dim] if inner is not None and inner.dim() > self._token_dim else None

    def _end(self, layer: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not self._open or (self._open[-1].layer, self._open[-1].thread) != (layer, threading.get_ident()):
            return  # another hook failed before the layer began
        opened = self._open.pop()
        self._close(opened)
        if opened.frame is not None and opened.plan is not None and result is not None:
            settle(opened.frame, opened.plan, num_tokens=opened.num_tokens)
            self._engine.settled(opened.frame, num_tokens=opened.num_tokens)
            self._newest = ref(opened.frame)
        elif opened.frame is None and torch.is_grad_enabled():
            self._announce(result)

    def _close(self, opened: _Open) -> None:
        if opened.frame is not None and opened.hooks is not None:
            opened.frame.tape.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            opened.hooks.__exit__(None, None, None)

    def _announce(self, result: Any) -> None:
        """The backward of a layer that is left alone says that the frame before it comes next."""
        newest = self._newest() if self._newest is not None else None
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.requires_grad]
        if newest is not None and outputs and not newest.is_announced:
            newest.is_announced = True
            frame = ref(newest)
            outputs[0].register_hook(lambda _: self._engine.prefetch(frame()))

    def _tape(self) -> Tape | None:
        frame = self._open[-1].frame if self._open else None
        return None if frame is None else frame.tape


def _nothing() -> None:
    return None


def _as_it_is(hook: Callable[..., Any]) -> Callable[..., Any]:
    """``hook`` for layers that may be compiled: torch.compile would try to compile it with them."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


def _device_of(layers: Sequence[nn.Module]) -> Device:
    """The device that the parameters are on."""
    for layer in layers:
        for parameter in layer.parameters():
            if parameter.device.type == "cuda":
                return open_device("cuda", local_rank=parameter.device.index)
    return open_device("cpu")


def _check(layers: Sequence[nn.Module], plan: ActivationPlan, segments: str | TokenSegments) -> None:
    problems = []
    if len(layers) != len(plan.layers):
        problems.append(
            Problem(
                "the activation plan is for another number of layers",
                got=f"{len(plan.layers)} in the plan, {len(layers)} given",
            )
        )
    if len(set(layers)) < len(layers):
        problems.append(
            Problem(
                "a layer is listed twice", hint="give each use a module of its own that calls the shared one"
            )
        )
    if isinstance(segments, str) and segments != AUTO:
        problems.append(Problem("no such segments", got=segments, allowed="auto, or TokenSegments(...)"))
    if isinstance(segments, TokenSegments):
        problems += list(dict.fromkeys(each for layer in layers for each in segments.problems(layer)))
    raise_if(problems)
