"""Initial weights that do not depend on the layout.

Each parameter has its own random stream, seeded by the run's seed and the parameter's global name, so that any rank
can make any parameter's values, and then keeps its part. Matrices are normal with deviation 0.02, those that write to
the residual stream scaled down by sqrt(2 x layers) (GPT-2); norms are ones. Or somebody else says what they are.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_STD = 0.02
_RESIDUAL_WRITERS = ("attn.wo.weight", "mlp.w_down.weight")


def materialize(
    module: nn.Module,
    *,
    device: torch.device,
    seed: int,
    num_layers: int,
    given: Callable[[str], Tensor] | None = None,
) -> None:
    """Give the meta-device ``module``, sharded or not, storage on ``device`` and its initial values.

    ``given`` has the whole parameter of a name, in place of one that is drawn.
    """
    module.to_empty(device=device)
    with torch.no_grad():
        for name, param in module.named_parameters():
            value = (
                given(name).to(device)
                if given
                else initial_value(name, param.shape, device=device, seed=seed, num_layers=num_layers)
            ).to(param.dtype)
            if isinstance(param, DTensor):
                # No rank sends: every rank has made the whole parameter and only cuts out its own part.
                part = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
                param.to_local().copy_(part.to_local())
            else:
                param.copy_(value)


def initial_value(name: str, size: torch.Size, *, device: torch.device, seed: int, num_layers: int) -> Tensor:
    """The whole float32 parameter ``name``; the same on every rank, for one kind of device."""
    if len(size) == 1:
        return torch.ones(size, device=device)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest))
    std = _STD / math.sqrt(2 * num_layers) if name.endswith(_RESIDUAL_WRITERS) else _STD
    return torch.randn(size, generator=generator, device=device) * std
