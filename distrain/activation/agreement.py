"""Ranks that compute a layer together must recompute the same tokens, or their collectives would not meet."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from distrain.core.errors import ConfigError


def agree_on(digest: str, groups: Sequence[dist.ProcessGroup]) -> None:
    """Check that all ranks of each group have the same plan (``digest`` in hexadecimal).

    Raises:
        ConfigError: they do not; on every rank of the group.
    """
    for group in groups:
        device = torch.device("cuda") if dist.get_backend(group) == dist.Backend.NCCL else torch.device("cpu")
        mine = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8).to(device)
        all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(all_of_them, mine, group=group)
        differing = [rank for rank, each in enumerate(all_of_them) if not torch.equal(each, all_of_them[0])]
        if differing:
            raise ConfigError(
                "ranks that compute layers together have different activation plans",
                got=f"ranks {', '.join(map(str, differing))} of the group differ from rank 0",
                allowed="one plan a tensor- or sequence-parallel group",
                hint="make the plan from the group's shapes, not from one rank's memory",
            )
