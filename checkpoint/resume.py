"""Brings everything that is tracked to a saved step: tensors in place, then what is not a tensor, then the generators.

Targets are prepared only when it is known what was saved (an optimizer that has not stepped has no moments to fill),
and objects are applied only after every tensor is there.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distrain.core.sidecar_client import KeeperClient

from .boxes import Item, apply_objects, collect, prepare_targets
from .keeper_config import TierConfig, tier_name, tier_url
from .ranks import Ranks
from .restore import Source, choose_objects, restore
from .rng import set_rng_state
from .safe_state import decode
from .tiers import open_storage

log = logging.getLogger(__name__)

RNG = "rng"
"""name among the objects of the states of all generators"""


def resume(
    tracked: dict[str, Any],
    *,
    client: KeeperClient | None,
    tiers: Sequence[TierConfig],
    node_rank: int,
    ranks: Ranks,
    strict: bool,
    only: int | None,
) -> int | None:
    """Bring ``tracked`` to the newest step that all ranks can read, or to ``only``; that step, None if there is none.

    Memory is read through ``client``, and ``tiers`` where they are seen from the node of ``node_rank``. Ranks read from
    what their own node sees: a step of which each node has a part on a disk of its own is passed over.

    Raises:
        ConfigError: what was saved does not fit what is tracked; lists all that does not.
        StorageError: a tier cannot be listed.
        MissingDependencyError: the package of a tier's store is not there.
    """
    filled: list[Item] = []

    def targets(source: Source) -> Sequence[Item]:
        prepare_targets(tracked, list(source.tensors))
        filled[:] = collect(tracked).items
        return filled

    if any(ranks.gather(node_rank)) and ranks.rank == 0:
        for tier in tiers:
            if not tier.shared:
                log.warning(
                    "steps on %s serve only where every node has all of them: nodes do not read each other's disks",
                    tier_name(tier),
                )
    source = restore(
        targets,
        client=client,
        # Also those of which there is nothing on this node yet: the ranks go through the tiers together.
        tiers=[open_storage(tier_url(tier, node_rank=node_rank)) for tier in tiers],
        ranks=ranks,
        strict=strict,
        only=only,
    )
    if source is None:
        return None
    objects = _objects(source, tracked, rank=ranks.rank)
    apply_objects(tracked, objects, filled)
    if RNG in objects:
        set_rng_state(objects[RNG])
    log.info("restored step %d from %s", source.step, source.where)
    return source.step


def _objects(source: Source, tracked: Mapping[str, Any], *, rank: int) -> dict[str, Any]:
    """What is not a tensor, by the name it is tracked under; optimizers take theirs from all writers."""
    objects = {
        name: decode(choose_objects(source.objects, name, rank=rank), name=name) for name in source.objects
    }
    for name, thing in tracked.items():
        if isinstance(thing, torch.optim.Optimizer) and name in source.objects:
            objects[name] = _merged([decode(each, name=name) for each in source.objects[name].values()])
    return objects


def _merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One optimizer's objects from those of all writers, each of which knew its own parameters."""
    values: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for state in states:
        values |= state["values"]
        groups += state["param_groups"]
    return {"values": values, "param_groups": groups}
