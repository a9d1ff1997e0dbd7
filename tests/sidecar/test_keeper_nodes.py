"""Keepers of several nodes agree on each checkpoint, whichever of them dies."""

import os
import signal
import socket
from pathlib import Path

import pytest

from distrain.checkpoint.keeper_config import KeeperConfig, TierConfig
from distrain.core.sidecar_client import KeeperLost
from distrain.core.sidecar_home import Home
from helpers.keepers import (
    Fault,
    Keepers,
    Rank,
    alive,
    committed,
    config_of,
    content,
    is_saved,
    local,
    pattern,
    until,
)

pytestmark = pytest.mark.processes


def two_nodes(keepers: Keepers, config: KeeperConfig) -> list[Rank]:
    """Three ranks: one on node 0, two on node 1."""
    nodes = [0, 1, 1]
    return [
        keepers.rank(config, rank=rank, world_size=3, node_rank=node, num_nodes=2)
        for rank, node in enumerate(nodes)
    ]


def pid_of(rank: Rank) -> int:
    """The keeper's process id; 0 while there is none."""
    try:
        return int(rank.client.status()["pid"])
    except KeeperLost:
        return 0


def is_linked(rank: Rank) -> bool:
    try:
        return bool(rank.client.status()["linked"])
    except KeeperLost:
        return False


def test_ranks_of_all_nodes_make_one_checkpoint(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    ranks = two_nodes(keepers, config_of(tier))
    assert len(keepers.pids) == 2
    for step in (1, 2):
        for each in ranks:
            assert each.save(step)
        for each in ranks:
            status = each.client.wait(step, level="committed", timeout_s=30)
            assert status.reached and status.state == "PROTECTED"
    assert is_saved(tier.url, 1, world_size=3) and is_saved(tier.url, 2, world_size=3)


def test_a_step_is_protected_only_when_the_other_node_has_it_too(keepers: Keepers, tmp_path: Path) -> None:
    ranks = two_nodes(keepers, config_of(local(tmp_path)))
    for each in ranks[:2]:
        each.save(1)
    assert not ranks[0].client.wait(1, level="protected", timeout_s=0.3).reached
    assert committed(str(tmp_path / "local")) == {}
    ranks[2].save(1)
    assert ranks[0].client.wait(1, level="protected", timeout_s=30).reached


def test_disks_of_nodes_get_their_part_and_the_shared_tier_gets_all_of_it(
    keepers: Keepers, tmp_path: Path
) -> None:
    near = TierConfig(url=f"{tmp_path}/node{{node}}", name="near", shared=False, keep_last=1)
    far = TierConfig(url=f"{tmp_path}/far", name="far")
    ranks = two_nodes(keepers, config_of(near, far))
    for step in (1, 2):
        for each in ranks:
            each.save(step)
        assert ranks[2].client.wait(step, level="committed", tier="far", timeout_s=40).reached
    assert ranks[2].client.wait(2, level="committed", timeout_s=1).committed == ("near", "far")
    assert is_saved(far.url, 1, world_size=3) and is_saved(far.url, 2, world_size=3)
    for node, writers in ((0, [0]), (1, [1, 2])):
        url = f"{tmp_path}/node{node}"
        until(lambda u=url, w=writers: set(committed(u, writers=w)) == {2}, "retention on the node")  # type: ignore[misc]
        for writer in writers:
            assert content(url, 2, writer) == pattern(2, writer, 1 << 20).tobytes()


def test_a_killed_member_costs_at_most_the_attempt(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path, bytes_per_s=1e6)
    ranks = two_nodes(keepers, config_of(tier, num_attempts=5))
    for each in ranks:
        each.save(1)
    assert ranks[0].client.wait(1, level="protected", timeout_s=30).reached
    old = pid_of(ranks[1])
    os.kill(old, signal.SIGKILL)
    until(lambda: pid_of(ranks[1]) not in (0, old) and pid_of(ranks[2]) not in (0, old), "another keeper")
    assert ranks[1].client.wait(1, level="committed", timeout_s=40).reached
    assert is_saved(tier.url, 1, world_size=3)
    for each in ranks:
        assert each.save(2)
    assert ranks[0].client.wait(2, level="committed", timeout_s=40).reached
    assert is_saved(tier.url, 2, world_size=3)


def test_a_node_that_is_lost_loses_the_step_loudly_and_its_successor_joins(
    keepers: Keepers, tmp_path: Path
) -> None:
    tier, config = local(tmp_path), config_of(local(tmp_path))
    rank = keepers.rank(config, rank=0, world_size=2, node_rank=0, num_nodes=2)
    environ = keepers.environ_of(1, 2)
    keepers.environ = environ
    trainer = keepers.trainer(config, rank=1, world_size=2, node_rank=1, num_nodes=2)
    for step in (1, 2):
        rank.save(step)
        trainer.do("save" if step == 1 else "open_and_stop", step)
        if step == 1:
            assert rank.client.wait(1, level="committed", timeout_s=30).reached
    os.kill(trainer.keeper_pid, signal.SIGKILL)
    trainer.kill()
    until(lambda: not alive(trainer.keeper_pid), "end of the keeper")
    successor = keepers.rank(config, rank=1, world_size=2, node_rank=1, num_nodes=2)
    for each in (rank, successor):
        assert each.save(3)
    assert rank.client.wait(3, level="committed", timeout_s=30).reached
    assert not rank.client.wait(2, level="committed", timeout_s=30).reached
    assert set(committed(tier.url)) == {1, 3}
    assert is_saved(tier.url, 1, world_size=2) and is_saved(tier.url, 3, world_size=2)


def test_what_only_a_lost_coordinator_knew_is_still_waited_for(keepers: Keepers, tmp_path: Path) -> None:
    """Another coordinator may have the step written after all: it is not said that it never will be."""
    tier = local(tmp_path, bytes_per_s=2e5)
    config = config_of(tier)
    keepers.environ = keepers.environ_of(0, 2)
    first = keepers.trainer(config, rank=0, world_size=2, node_rank=0, num_nodes=2)
    rank = keepers.rank(config, rank=1, world_size=2, node_rank=1, num_nodes=2)
    first.do("save", 1)
    assert rank.save(1)
    assert rank.client.wait(1, level="protected", timeout_s=30).reached
    os.kill(first.keeper_pid, signal.SIGKILL)
    first.kill()
    until(lambda: not is_linked(rank), "the loss of the coordinator")
    status = rank.client.wait(1, level="committed", timeout_s=0.1)
    assert not status.reached and status.reason == ""
    second = keepers.rank(config, rank=0, world_size=2, node_rank=0, num_nodes=2)
    until(lambda: is_linked(rank), "another coordinator")
    assert not rank.client.wait(1, level="committed", timeout_s=0.1).reason
    for each in (rank, second):
        assert each.save(1)
    assert second.client.wait(1, level="committed", timeout_s=40).reached
    assert is_saved(tier.url, 1, world_size=2)


POINTS = ["prepared", "manifest", "publish", "rename", "committed", "collect"]


@pytest.mark.parametrize("point", POINTS)
def test_a_coordinator_killed_anywhere_leaves_the_old_or_the_new_and_the_next_one_finishes(
    keepers: Keepers, tmp_path: Path, point: str
) -> None:
    tier = local(tmp_path)
    keepers.start_keeper(Fault(f"checkpoint.{point}", "kill", on_hit=2))
    ranks = two_nodes(keepers, config_of(tier))
    coordinator, member = pid_of(ranks[0]), pid_of(ranks[1])
    for step in (1, 2):
        for each in ranks:
            assert each.save(step)
        if step == 1:
            assert ranks[0].client.wait(1, level="committed", timeout_s=30).reached
    until(lambda: not alive(coordinator), f"the coordinator reaches {point}")
    found = set(committed(tier.url))
    assert found in ({1}, {1, 2}) and is_saved(tier.url, 1, world_size=3)
    assert 2 not in found or is_saved(tier.url, 2, world_size=3)
    until(lambda: pid_of(ranks[0]) not in (0, coordinator) and is_linked(ranks[1]), "another coordinator")
    assert pid_of(ranks[1]) == member
    assert ranks[2].client.wait(2, level="committed", timeout_s=40).reached
    assert is_saved(tier.url, 2, world_size=3) and is_saved(tier.url, 1, world_size=3)
    for each in ranks:
        assert each.save(3)
    assert ranks[0].client.wait(3, level="committed", timeout_s=30).reached


def test_without_a_coordinator_training_is_not_held_up(keepers: Keepers, tmp_path: Path) -> None:
    config = config_of(local(tmp_path))
    rank = keepers.rank(config, rank=1, world_size=2, node_rank=1, num_nodes=2)
    assert rank.save(1) and rank.save(2)
    assert not rank.save(3)  # no slot can be given up: nobody says that a newer step is complete
    assert any("no coordinator" in str(notice["text"]) for notice in rank.notices)
    until(lambda: "coordinator_lost" in rank.events(), "it is missed aloud")
    first = keepers.rank(config, rank=0, world_size=2, node_rank=0, num_nodes=2)
    until(lambda: is_linked(rank), "the coordinator")
    assert first.save(2)
    assert first.client.wait(2, level="committed", timeout_s=30).reached
    for each in (rank, first):
        assert each.save(4)
    assert rank.client.wait(4, level="committed", timeout_s=30).reached
    assert is_saved(str(tmp_path / "local"), 2, world_size=2)


def test_strangers_at_the_coordinators_port_are_of_no_importance(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    ranks = two_nodes(keepers, config_of(tier))
    host, _, port = Home("job", node_rank=0, environ=keepers.environ).coordinator().rpartition(":")
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"DT\x01\x00" + b"\xff" * 12, b"", bytes(100)):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    with socket.create_connection((host, int(port))):  # one who says nothing, and stays
        for each in ranks:
            assert each.save(1)
        assert ranks[2].client.wait(1, level="committed", timeout_s=30).reached
    assert host == "127.0.0.1"


def test_a_keeper_with_another_key_is_not_let_in(keepers: Keepers, tmp_path: Path) -> None:
    config = config_of(local(tmp_path))
    first = keepers.rank(config, rank=0, world_size=2, node_rank=0, num_nodes=2)
    address = Home("job", node_rank=0, environ=keepers.environ).coordinator()
    keepers.environ = {**keepers.environ, "DISTRAIN_JOB_KEY": "ab" * 32, "DISTRAIN_COORDINATOR": address}
    rank = keepers.rank(config, rank=1, world_size=2, node_rank=1, num_nodes=2)
    first.save(1)
    rank.save(1)
    assert not first.client.wait(1, level="protected", timeout_s=1).reached
    assert not is_linked(rank)
