"""Process groups by their ranks: each is made once, on first use, and found again.

Communicators are costly (milliseconds on gloo, tens of megabytes on NCCL), so whoever needs one asks here.
"""

from collections.abc import Sequence

import torch.distributed as dist

from distrain.core.errors import ConfigError


class GroupRegistry:
    """All process groups of this rank."""

    def __init__(self, axes: dict[str, dist.ProcessGroup]) -> None:
        """``axes`` are the groups that exist already: the mesh's, by the name of their axis."""
        self._axes = axes
        self._by_ranks: dict[tuple[object, ...], dist.ProcessGroup] = {}
        for group in axes.values():
            self._by_ranks.setdefault(tuple(dist.get_process_group_ranks(group)), group)
        self._separate_links = dist.get_backend() != dist.Backend.GLOO

    def axis(self, name: str) -> dist.ProcessGroup:
        """The group along the mesh axis ``name``: pp, dp, dp_replicate, dp_shard, tp, or "model" for dp x tp."""
        try:
            return self._axes[name]
        except KeyError:
            raise ConfigError("unknown mesh axis", got=name, allowed=", ".join(self._axes)) from None

    def of(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """The group of these global ``ranks``. Its members must all ask, in the same order as for other new groups."""
        key = tuple(ranks)
        if key not in self._by_ranks:
            self._by_ranks[key] = _new_group(key)
        return self._by_ranks[key]

    def link(self, src: int, dst: int, kind: int) -> dist.ProcessGroup | None:
        """The group for messages of one kind from ``src`` to ``dst``; None is the default group.

        Gloo needs no separate one, since it matches messages by their tags.
        """
        if not self._separate_links:
            return None
        key = ("link", src, dst, kind)
        if key not in self._by_ranks:
            self._by_ranks[key] = _new_group(tuple(sorted((src, dst))))
        return self._by_ranks[key]


def _new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    # Only the members take part, so that groups can be made in the middle of a step.
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group
