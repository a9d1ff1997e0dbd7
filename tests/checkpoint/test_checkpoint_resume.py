"""Where a job goes on from once no keeper remembers it: tiers by any address, seen from each node."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from distrain.checkpoint.keeper_config import TierConfig
from distrain.checkpoint.ranks import Ranks
from distrain.checkpoint.resume import resume
from helpers.checkpoints import whole, write_checkpoint
from helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

Found = tuple[int | None, float, list[str]]
"""the step, the weight and what was logged"""


def write(root: Path, *, step: int) -> Path:
    """A step in two parts, of which each writer has one."""
    weight, bias = np.full((1, 2), step, np.float32), np.full(1, step, np.float32)
    return write_checkpoint(
        root, [[whole("model.weight", "float32", weight)], [whole("model.bias", "float32", bias)]], step=step
    )


def go_on(tiers: Sequence[TierConfig], *, node_rank: int) -> Found:
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("distrain.checkpoint")
    logger.addHandler(handler)
    model = torch.nn.Linear(2, 1)
    step = resume(
        {"model": model},
        client=None,
        tiers=tiers,
        node_rank=node_rank,
        ranks=Ranks(),
        strict=True,
        only=None,
    )
    logger.removeHandler(handler)
    weight = torch.cat([param.detach().reshape(-1) for param in model.parameters()])
    assert step is None or bool((weight == step).all())
    return step, float(weight[0]), lines


def on_two_nodes(rank: int, world_size: int, near: str, far: str) -> Found:
    os.environ["GROUP_RANK"] = str(rank)
    return go_on([TierConfig(url=near, shared=False), TierConfig(url=far)], node_rank=rank)


def test_the_disk_of_a_node_alone_and_any_address_serve(tmp_path: Path) -> None:
    write(tmp_path / "near-0", step=4)
    write(tmp_path / "far", step=2)
    near = TierConfig(url=f"{tmp_path}/near-{{node}}", shared=False)
    far = TierConfig(url=f"file://{tmp_path}/far")
    assert go_on([near, far], node_rank=0) == (4, 4.0, [])
    shutil.rmtree(tmp_path / "near-0")
    assert go_on([near, far], node_rank=0) == (2, 2.0, [])


def test_an_object_store_serves(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.put(str(write(tmp_path, step=3)), "/resumed/step-00000003", recursive=True)
    try:
        assert go_on([TierConfig(url="memory://resumed")], node_rank=0)[:2] == (3, 3.0)
    finally:
        store.rm("/resumed", recursive=True)


def test_parts_on_disks_of_several_nodes_give_way_to_the_tier_that_all_see(tmp_path: Path) -> None:
    for node in (0, 1):
        folder = write(tmp_path / f"near-{node}", step=4)
        shutil.rmtree(folder / "data" / str(1 - node))
    write(tmp_path / "far", step=4)
    write(tmp_path / "far", step=2)
    found = run_ranks(on_two_nodes, 2, f"{tmp_path}/near-{{node}}", f"file://{tmp_path}/far")
    assert [(step, weight) for step, weight, _ in found] == [(4, 4.0)] * 2
    assert "near-{node} serve only where every node has all" in found[0][2][0]
    assert all("step-00000004 is passed over" in "".join(lines) for _, _, lines in found)


def test_a_node_whose_disk_is_new_does_not_hold_up_the_others(tmp_path: Path) -> None:
    write(tmp_path / "near-0", step=4)
    write(tmp_path / "far", step=2)
    found = run_ranks(on_two_nodes, 2, f"{tmp_path}/near-{{node}}", f"file://{tmp_path}/far")
    assert [(step, weight) for step, weight, _ in found] == [(2, 2.0)] * 2
