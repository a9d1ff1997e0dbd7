"""Whoever is killed, whenever: what was complete stays, what was not is never taken for it."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from distrain.core.sidecar_client import KeeperLost
from helpers.keepers import (
    DEADLINE_S,
    Fault,
    Keepers,
    Rank,
    alive,
    committed,
    config_of,
    is_saved,
    local,
    pattern,
    until,
)

pytestmark = pytest.mark.processes

NBYTES = 1 << 20


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), f"end of {pid}")


def in_memory(rank: Rank, step: int) -> bool:
    """Whether this node's memory has exactly what all its writers had at that step."""
    pinned = rank.client.pin(step)
    rank.client.unpin(step)
    return all(bytes(each.memory[:NBYTES]) == pattern(step, each.writer, NBYTES).tobytes() for each in pinned)


def keeper_of(rank: Rank) -> int:
    return int(rank.client.status()["pid"])


def answers(rank: Rank) -> bool:
    """Whether a keeper is there (again)."""
    try:
        return keeper_of(rank) > 0
    except KeeperLost:
        return False


def try_to_save(rank: Rank, step: int) -> bool:
    """Save, unless the keeper is killed meanwhile."""
    try:
        return rank.save(step)
    except KeeperLost:
        return False


def test_a_killed_trainer_leaves_its_snapshot_in_memory_and_on_disk(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    trainer = keepers.trainer(config_of(tier))
    trainer.do("save", 3)
    trainer.kill()
    assert alive(trainer.keeper_pid)
    rank = keepers.rank(config_of(tier))
    assert keepers.pids == {trainer.keeper_pid}
    assert [(each.step, each.protected) for each in rank.client.sealed_steps()] == [(3, True)]
    assert in_memory(rank, 3)
    assert rank.client.wait(3, level="committed", timeout_s=30).reached
    assert is_saved(tier.url, 3)


def test_a_trainer_killed_while_it_fills_a_slot_leaves_the_step_before(
    keepers: Keepers, tmp_path: Path
) -> None:
    tier = local(tmp_path)
    trainer = keepers.trainer(config_of(tier))
    trainer.do("save", 3)
    trainer.do("open_and_stop", 4)
    trainer.kill()
    rank = keepers.rank(config_of(tier))
    until(lambda: [each.step for each in rank.client.sealed_steps()] == [3], "step 4 is gone")
    assert in_memory(rank, 3)
    assert "is gone" in rank.client.wait(4, level="committed", timeout_s=30).reason
    for step in (4, 5):
        assert rank.save(step)
        assert rank.client.wait(step, level="committed", timeout_s=30).reached
    assert is_saved(tier.url, 4) and is_saved(tier.url, 5)


def test_the_ranks_that_are_left_complete_a_step_that_the_killed_one_had_sealed(
    keepers: Keepers, tmp_path: Path
) -> None:
    tier = local(tmp_path)
    rank = keepers.rank(config_of(tier), rank=0, world_size=2)
    trainer = keepers.trainer(config_of(tier), rank=1, world_size=2)
    trainer.do("save", 1)
    trainer.kill()
    rank.save(1)
    assert rank.client.wait(1, level="committed", timeout_s=30).state == "PROTECTED"
    assert is_saved(tier.url, 1, world_size=2)


def test_the_end_waits_for_no_step_that_another_rank_ends_without(keepers: Keepers, tmp_path: Path) -> None:
    """Whether the keeper that was told of the step is still there or not."""
    tier, steps = local(tmp_path), (1, 3)
    for first in steps:
        ranks = [keepers.rank(config_of(tier), rank=rank, world_size=2) for rank in range(2)]
        for rank in ranks:
            rank.save(first)
        ranks[0].save(first + 1)
        if first == steps[-1]:
            assert ranks[0].client.wait(first, level="committed", timeout_s=30).reached
            kill(keeper_of(ranks[0]))
            until(lambda ranks=ranks: all(map(answers, ranks)), "another keeper")  # type: ignore[misc]
        for rank in reversed(ranks):
            assert rank.client.close(flush=True, timeout_s=DEADLINE_S)
        assert not [notice for notice in ranks[0].notices if notice["event"] == "not_flushed"]
    assert set(committed(tier.url)) == set(steps)


def test_a_step_that_a_killed_rank_had_not_sealed_is_lost_for_all(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    rank = keepers.rank(config_of(tier), rank=0, world_size=2)
    trainer = keepers.trainer(config_of(tier), rank=1, world_size=2)
    for step in (1, 2):
        rank.save(step)
        trainer.do("save" if step == 1 else "open_and_stop", step)
    assert rank.client.wait(1, level="committed", timeout_s=30).reached
    trainer.kill()
    assert "rank 1" in rank.client.wait(2, level="committed", timeout_s=30).reason
    assert [each.step for each in rank.client.sealed_steps()] == [1]
    assert set(committed(tier.url)) == {1}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_everybody_do_not_end_a_keeper_that_is_needed(
    keepers: Keepers, tmp_path: Path, signum: int
) -> None:
    tier = local(tmp_path)
    rank = keepers.rank(config_of(tier))
    (pid,) = keepers.pids
    os.kill(pid, signum)
    assert rank.save(1)
    assert rank.client.wait(1, level="committed", timeout_s=30).reached
    assert os.getsid(pid) != os.getsid(0)


def test_a_killed_keeper_is_replaced_and_takes_over_what_is_in_memory(
    keepers: Keepers, tmp_path: Path
) -> None:
    tier = local(tmp_path, bytes_per_s=6e6)
    ranks = [keepers.rank(config_of(tier), rank=rank, world_size=2) for rank in range(2)]
    for each in ranks:
        each.save(1)
    assert ranks[0].client.wait(1, level="protected", timeout_s=30).reached
    (pid,) = keepers.pids
    kill(pid)
    until(lambda: all(answers(each) for each in ranks), "another keeper")
    assert {keeper_of(each) for each in ranks} not in ({pid}, set()) and keeper_of(ranks[0]) == keeper_of(
        ranks[1]
    )
    assert ranks[0].client.wait(1, level="protected", timeout_s=30).reached
    assert in_memory(ranks[0], 1)
    assert ranks[0].client.wait(1, level="committed", timeout_s=30).reached
    assert is_saved(tier.url, 1, world_size=2)
    for each in ranks:
        assert each.save(2)
    assert ranks[1].client.wait(2, level="committed", timeout_s=30).reached
    assert is_saved(tier.url, 2, world_size=2)


def test_a_keeper_killed_while_a_slot_is_filled_costs_that_snapshot_only(
    keepers: Keepers, tmp_path: Path
) -> None:
    tier = local(tmp_path)
    rank = keepers.rank(config_of(tier))
    rank.save(1)
    slot = rank.open(2)
    assert slot
    kill(keeper_of(rank))
    with pytest.raises(KeeperLost):
        rank.fill(slot)
        rank.client.seal(slot)
    until(lambda: answers(rank), "another keeper")
    assert [each.step for each in rank.client.sealed_steps()] == [1]
    assert in_memory(rank, 1)
    assert rank.save(3)
    assert rank.client.wait(3, level="committed", timeout_s=30).reached
    assert 2 not in committed(tier.url)


def test_memory_that_was_changed_after_its_keeper_died_is_not_taken_over(keepers: Keepers) -> None:
    keepers.start_keeper()
    trainer = keepers.rank(config_of())
    for step in (1, 2):
        trainer.save(step)
        assert trainer.client.wait(step, level="protected", timeout_s=30).reached
        trainer.client.pin(step)  # its checksums are known from here on
    pid = keeper_of(trainer)
    index = next(
        i for i, memory in enumerate(trainer.client.slots) if memory[8:16] == pattern(2, 0, 16)[8:].data
    )
    kill(pid)
    np.frombuffer(trainer.client.slots[index], np.uint8)[4321] ^= 1
    until(lambda: answers(trainer), "another keeper")
    until(lambda: [each.step for each in trainer.client.sealed_steps()] == [1], "only the sound one")
    assert in_memory(trainer, 1)


def test_trainer_and_keeper_killed_together_leave_what_is_on_disk(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path, bytes_per_s=5e5)
    trainer = keepers.trainer(config_of(tier))
    trainer.do("save", 1)
    trainer.do("client.wait", 1, level="committed", timeout_s=30)
    trainer.do("save", 2)
    os.kill(trainer.keeper_pid, signal.SIGKILL)
    trainer.kill()
    until(lambda: not alive(trainer.keeper_pid), "end of the keeper")
    assert set(committed(tier.url)) == {1} and is_saved(tier.url, 1)
    rank = keepers.rank(config_of(tier))
    assert rank.client.sealed_steps() == ()
    assert rank.save(2)
    assert rank.client.wait(2, level="committed", timeout_s=40).reached
    assert is_saved(tier.url, 2)


def test_a_keeper_without_trainers_writes_what_it_has_and_ends_after_a_while(
    keepers: Keepers, tmp_path: Path
) -> None:
    tier = local(tmp_path, bytes_per_s=2e6)
    trainer = keepers.trainer(config_of(tier, idle_limit_s=0.5))
    trainer.do("save", 1)
    trainer.kill()
    until(lambda: not alive(trainer.keeper_pid), "end of the keeper")
    assert is_saved(tier.url, 1)
    assert os.listdir(tmp_path / "run" / "distrain") == []


def test_a_job_that_comes_back_with_other_ranks_can_read_what_the_old_ones_left(
    keepers: Keepers, tmp_path: Path
) -> None:
    tier = local(tmp_path)
    trainers = [keepers.trainer(config_of(tier), rank=rank, world_size=2) for rank in range(2)]
    for each in trainers:
        each.do("save", 4)
    for each in trainers:
        each.kill()
    rank = keepers.rank(config_of(tier), world_size=1)
    (found,) = rank.client.sealed_steps()
    assert (found.step, found.world_size, found.writers, found.protected) == (4, 2, (0, 1), True)
    assert in_memory(rank, 4)
    for step in (5, 6):
        assert rank.save(step)
        assert rank.client.wait(step, level="committed", timeout_s=30).reached
    until(
        lambda: {row["world_size"] for row in rank.client.status()["ranks"]} == {1},
        "old memory is given back",
    )
    assert is_saved(tier.url, 4, world_size=2) and is_saved(tier.url, 6)


POINTS = [
    ("checkpoint.begin", 1),
    ("checkpoint.pwrite", 1),
    ("checkpoint.fsync", 1),
    ("checkpoint.record", 1),
    ("checkpoint.prepared", 1),
    ("checkpoint.prepared", 2),
    ("checkpoint.manifest", 1),
    ("checkpoint.publish", 1),
    ("checkpoint.rename", 1),
    ("checkpoint.committed", 1),
    ("checkpoint.latest", 1),
    ("checkpoint.collect", 1),
]


@pytest.mark.parametrize(("point", "on_hit"), POINTS)
def test_a_keeper_killed_anywhere_leaves_the_old_or_the_new_and_the_next_one_finishes(
    keepers: Keepers, tmp_path: Path, point: str, on_hit: int
) -> None:
    tier = local(tmp_path)
    before = keepers.rank(config_of(tier), job="before")
    before.save(1)
    assert before.client.wait(1, level="committed", timeout_s=30).reached
    before.client.close(flush=True)
    keepers.start_keeper(Fault(point, "kill", on_hit))
    ranks = [keepers.rank(config_of(tier), rank=rank, world_size=2) for rank in range(2)]
    pid = keeper_of(ranks[0])
    sealed = [try_to_save(each, 2) for each in ranks]
    until(lambda: not alive(pid), f"the keeper reaches {point}")
    found = set(committed(tier.url))
    assert found in ({1}, {1, 2})
    assert is_saved(tier.url, 1)
    assert 2 not in found or is_saved(tier.url, 2, world_size=2)
    until(lambda: all(answers(each) for each in ranks), "another keeper")
    new = (
        2 if all(sealed) else 3
    )  # killed while a rank was filling its slot: that step is lost, the next is not
    for each in ranks:
        assert new == 2 or each.save(new)
    assert ranks[0].client.wait(new, level="committed", timeout_s=30).reached
    assert is_saved(tier.url, new, world_size=2) and is_saved(tier.url, 1)
