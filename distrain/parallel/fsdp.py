"""FSDP2 and HSDP: torch's ``fully_shard``, told by the pipeline which backward of a step is the last.

Gradients pile up unsharded until the last micro-batch of each stage, then each layer is reduced as its backward ends.
Without a pipeline the gathered parameters are freed after forward; in a pipeline they stay until the step ends, since
the next micro-batch needs them at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from .context import Parallel
from .fsdp_comm import exchange_directly
from .shards import Segment, Shard, box_of, is_decayed


def wrap(module: nn.Module, layers: Sequence[nn.Module], parallel: Parallel) -> None:
    """Shard ``module`` in place over the data-parallel ranks, each of ``layers`` as a unit of its own."""
    degrees = parallel.degrees
    axes = ("dp_replicate", "dp_shard") if degrees.dp_shard < degrees.dp else ("dp_shard",)
    mesh = parallel.mesh[axes]
    for unit in (*layers, module):
        # The root's backward comes first: freed after forward, its parameters would be gathered again at once.
        fully_shard(unit, mesh=mesh, reshard_after_forward=degrees.pp == 1 and unit is not module)
        assert isinstance(unit, FSDPModule)
        # The loss is weighted by tokens already: sums, which gloo would not take for a scaled sum.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if dist.get_backend(parallel.groups.axis("dp_shard")) == dist.Backend.GLOO:
            exchange_directly(unit)


class FullySharded:
    """Data parallelism of wrapped ``modules`` (by stage); a ``shards.DataParallelism``."""

    def __init__(self, modules: dict[int, nn.Module], parallel: Parallel) -> None:
        self._modules: dict[int, FSDPModule] = {}
        for index, module in modules.items():
            assert isinstance(module, FSDPModule)
            self._modules[index] = module
        self._params = [(n, p) for m in modules.values() for n, p in m.named_parameters()]
        replicas = parallel.degrees.dp // parallel.degrees.dp_shard
        self.shards: Sequence[Shard] = [
            _shard(name, param, replicas, parallel) for name, param in self._params
        ]

    def begin(self, micro_batches: int) -> None:
        """Nothing to do; see DataParallelism."""

    @contextmanager
    def around(self, op: str, stage: int, micro_batch: int, *, last: bool) -> Iterator[None]:
        """Let the last backward of a stage reduce its gradients; see MicrobatchHooks."""
        module = self._modules[stage]
        if op != "F":
            # A split backward never passes the hooks that reduce: its last W reduces by hand.
            _set_reducing(module, last and op == "B")
        yield
        if op == "W" and last:
            _set_reducing(module, True)
            _reduce_now(module)

    def reduce(self) -> None:
        """Hand the sharded gradients to the shards; see DataParallelism."""
        for shard, (_, param) in zip(self.shards, self._params, strict=True):
            gradient = param.grad
            assert isinstance(gradient, DTensor)
            shard.param.grad = gradient.to_local()
            param.grad = None

    def gather(self) -> None:
        """Nothing to do: each layer gathers itself before it runs; see DataParallelism."""

    def updated(self) -> None:
        """Nothing to do; see DataParallelism."""


def _set_reducing(module: FSDPModule, reducing: bool) -> None:
    """Whether the coming backward reduces gradients and frees the gathered parameters."""
    module.set_is_last_backward(reducing)
    module.set_requires_gradient_sync(reducing)
    module.set_reshard_after_backward(reducing)


def _reduce_now(module: FSDPModule) -> None:
    """Do what the hooks of a whole backward would have done at its end.

    FSDP2 has no public call for this; torch's own pipeline schedules reach inside in the same way.
    """
    root: Any = fully_shard.state(module)  # type: ignore[attr-defined]
    for state in root._state_ctx.all_states:
        # Several groups a state since torch 2.13, one before.
        groups = (
            state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        )
        for group in groups:
            if group is not None:
                group.post_backward()
    root._root_post_backward_final_callback()


def _shard(name: str, param: Tensor, replicas: int, parallel: Parallel) -> Shard:
    assert isinstance(param, DTensor)
    tp_copies = parallel.degrees.tp if _replicated_over_tp(param) else 1
    local = nn.Parameter(param.to_local().detach())
    segment = Segment(box_of(name, param), 0, 0, local.numel())
    return Shard(local, (segment,), replicas * tp_copies, is_decayed(param))


def _replicated_over_tp(param: DTensor) -> bool:
    names = param.device_mesh.mesh_dim_names or ()
    return "tp" not in names or isinstance(param.placements[names.index("tp")], Replicate)
