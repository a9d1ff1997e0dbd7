"""Tensor parallelism with sequence-parallel norms, as DTensor styles (PTD-P section 2.3; Korthikanti et al. 2022).

Between two branches the residual stream is sharded over the tokens: [B, T / tp, D] on each rank. A branch gathers
the tokens once, its column matrices split the features, and its row matrix sums and scatters back::

      [B, T/tp, D] ── norm ── gather ──┬─ wq wk wv ─ attention ─ wo ─┬── reduce-scatter ── [B, T/tp, D]
                                       └──── features split by tp ───┘

A pipeline stage therefore sends only its tokens, 1/tp of the activation, without PTD-P's extra scatter and gather.
The embedding is split by features, so that going over to the token split is one all-to-all and its gradient needs no
reduction; split by vocabulary, as in Megatron, it costs tp times that volume. Logits are split over the vocabulary and
the loss is taken on them so.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from .exchange import all_to_all
from .roles import Role

IGNORED = -100
"""target value of tokens that carry no loss (padding)"""


def _style(role: Role) -> ParallelStyle:
    match role:
        case Role.EMBEDDING:
            return ColwiseParallel()
        case Role.NORM:
            return SequenceParallel(use_local_output=True)
        case Role.BRANCH:
            return PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=False
            )
        case Role.COLUMN:
            return ColwiseParallel()
        case Role.ROW:
            return RowwiseParallel(output_layouts=Shard(1))
        case Role.HEAD:
            return ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)


def parallelize(module: nn.Module, mesh: DeviceMesh, *, roles: Mapping[str, Role]) -> None:
    """Shard ``module`` in place over the one-axis ``mesh`` as its ``roles`` say; a mesh of one rank changes nothing."""
    if mesh.size() == 1:
        return
    parallelize_module(module, mesh, {name: _style(role) for name, role in roles.items()})
    group = mesh.get_group()
    for name in (name for name, role in roles.items() if role is Role.EMBEDDING):
        # DTensor would gather everything on gloo instead.
        module.get_submodule(name).register_forward_hook(
            lambda _module, _ids, features: all_to_all(features, group, split_dim=1, concat_dim=2)
        )


def loss_context(tp_degree: int) -> AbstractContextManager[None]:
    """Context for forward and backward of a step, in which a loss on vocabulary-sharded logits is computed locally."""
    return loss_parallel() if tp_degree > 1 else nullcontext()


def token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum of the cross entropies of all targets but ``IGNORED`` ones, in nats; scalar, a plain tensor.

    Float16 and bfloat16 logits are raised to float32. Vocabulary-sharded logits need ``loss_context`` around forward
    and backward.
    """
    logits = logits_BTV.flatten(0, 1)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    loss = F.cross_entropy(logits, targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss.to_local() if isinstance(loss, DTensor) else loss
