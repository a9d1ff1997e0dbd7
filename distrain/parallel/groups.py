"""Process groups by their ranks: each is made once, on first use, and found again.

Communicators are costly (milliseconds on gloo, tens of megabytes on NCCL), so whoever needs one asks here.

Only its members make a group, so that one can be made in the middle of a run. torch's own ``new_group`` can do that
too, but names the group by how many groups the asking rank has: where that differs between the members, they wait for
each other under different names forever. Here the name follows from the ranks, the registry and how often this very
group has been made before, on which its members agree.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from distrain.core.errors import ConfigError


class GroupRegistry:
    """All process groups of this rank, or all of one purpose, whose traffic stays apart from that of others."""

    def __init__(self, axes: Mapping[str, dist.ProcessGroup], *, timeout: timedelta, name: str = "") -> None:
        """``axes`` are the groups that exist already: the mesh's, by the name of their axis.

        ``timeout`` is that of collectives in new groups; ``name`` tells the registry from others of this job.
        """
        self._axes, self._timeout, self._name = axes, timeout, name
        self._num_apart = 0
        self._by_key: dict[tuple[object, ...], dist.ProcessGroup] = {}
        self._times_made: Counter[tuple[object, ...]] = Counter()
        for group in axes.values():
            self._by_key.setdefault(tuple(dist.get_process_group_ranks(group)), group)
        self._separate_links = dist.get_backend() != dist.Backend.GLOO

    def axis(self, name: str) -> dist.ProcessGroup:
        """The group along the mesh axis ``name``: pp, dp, dp_replicate, dp_shard, tp, or "model" for dp x tp."""
        try:
            return self._axes[name]
        except KeyError:
            raise ConfigError("unknown mesh axis", got=name, allowed=", ".join(self._axes)) from None

    def apart(self, name: str) -> "GroupRegistry":
        """A registry without groups as yet, for traffic that must not mix with this one's; all ranks ask alike."""
        self._num_apart += 1
        return GroupRegistry({}, timeout=self._timeout, name=f"{self._name}/{name} {self._num_apart}")

    def of(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """The group of these ascending global ``ranks``.

        The members of a new group must all ask for it, and those of several groups in the same order.
        """
        return self._made(tuple(ranks), tuple(ranks))

    def drop(self, ranks: Sequence[int]) -> None:
        """Give up the group of ``ranks``, if there is one; all members must, and nothing may be under way in it."""
        group = self._by_key.pop(tuple(ranks), None)
        if group is not None:
            dist.destroy_process_group(group)

    def link(self, src: int, dst: int, kind: int) -> dist.ProcessGroup | None:
        """The group for messages of one kind from ``src`` to ``dst``; None is the default group.

        Gloo needs no separate one, since it matches messages by their tags.
        """
        if not self._separate_links:
            return None
        return self._made(("link", src, dst, kind), tuple(sorted((src, dst))))

    def _made(self, key: tuple[object, ...], ranks: tuple[int, ...]) -> dist.ProcessGroup:
        if key not in self._by_key:
            name = f"{self._name}/{key}/{self._times_made[key]}"
            self._by_key[key] = _new_group(ranks, name=name, timeout=self._timeout)
            self._times_made[key] += 1
        return self._by_key[key]


def _new_group(ranks: tuple[int, ...], *, name: str, timeout: timedelta) -> dist.ProcessGroup:
    """A group under a ``name`` that all members know; torch has no public call that takes one."""
    backend, store = distributed_c10d._world.pg_map[distributed_c10d._get_default_group()]
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks),
        ranks.index(dist.get_rank()),
        list(ranks),
        dist.Backend(backend),
        store,
        hashlib.blake2b(name.encode(), digest_size=16).hexdigest(),  # type: ignore[arg-type]
        timeout=timeout,
    )
    assert isinstance(group, dist.ProcessGroup)
    distributed_c10d._world.pg_group_ranks[group] = {rank: index for index, rank in enumerate(ranks)}
    return group
