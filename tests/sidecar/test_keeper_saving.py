"""What a trainer gives to its keeper ends up on disk, exactly, and stays in memory until something newer is there."""

import os
from pathlib import Path

import numpy as np
import pytest

from distrain.checkpoint.layout import EXTENT_BYTES, STRIDE
from distrain.core.sidecar_client import KeeperClient, KeeperLost, KeeperRefused
from helpers.keepers import Keepers, alive, committed, config_of, content, is_saved, local, pattern, until

pytestmark = pytest.mark.processes


def test_a_step_is_committed_with_exactly_its_bytes(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    rank = keepers.rank(config_of(tier))
    assert rank.save(7)
    status = rank.client.wait(7, level="committed", timeout_s=30)
    assert status.reached and status.committed == ("local",) and status.state == "PROTECTED"
    assert is_saved(tier.url, 7)


def test_a_state_of_several_extents_with_a_ragged_end_is_saved(keepers: Keepers, tmp_path: Path) -> None:
    tier, nbytes = local(tmp_path), 2 * EXTENT_BYTES + 12345
    rank = keepers.rank(config_of(tier), nbytes=nbytes)
    assert rank.save(1)
    assert rank.client.wait(1, level="committed", timeout_s=30).reached
    assert is_saved(tier.url, 1, nbytes=nbytes)


def test_a_slot_that_held_more_before_pads_with_zeros(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    rank = keepers.rank(config_of(tier), num_slots=1)
    for memory in rank.client.slots:
        rank.client.ready()
        np.frombuffer(memory, np.uint8)[:] = 255
    assert rank.save(1)
    assert rank.client.wait(1, level="committed", timeout_s=30).reached
    assert content(tier.url, 1, 0) == pattern(1, 0, 1 << 20).tobytes()  # checks the padding as well


def test_extents_are_written_before_the_snapshot_is_sealed(keepers: Keepers, tmp_path: Path) -> None:
    rank = keepers.rank(config_of(local(tmp_path)), nbytes=2 * EXTENT_BYTES)
    slot = rank.open(1)
    assert slot
    rank.client.copied(slot, [0])
    until(
        lambda: rank.client.status()["tiers"][0]["bytes_written"] == EXTENT_BYTES, "the first extent on disk"
    )
    rank.fill(slot)
    rank.client.seal(slot)
    assert rank.client.wait(1, level="committed", timeout_s=30).reached


def test_many_steps_follow_each_other_and_retention_keeps_the_newest(
    keepers: Keepers, tmp_path: Path
) -> None:
    tier = local(tmp_path, keep_last=2, keep_every=4)
    rank = keepers.rank(config_of(tier))
    for step in range(1, 9):
        assert rank.save(step)
    rank.client.close(flush=True)
    until(lambda: set(committed(tier.url)) == {4, 7, 8}, "retention")
    assert is_saved(tier.url, 8)


def test_only_a_free_slot_is_filled_without_asking(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    rank = keepers.rank(config_of(tier))
    assert rank.save(1) and rank.client.wait(1, level="committed", timeout_s=30).reached
    rank.client._free = 0  # which is not true: it has step 1
    slot = rank.open(2)
    assert slot and slot.index == 0
    with pytest.raises(KeeperRefused, match="not being filled"):
        rank.client.seal(slot)
    assert [each.step for each in rank.client.sealed_steps()] == [1]
    assert rank.save(3) and rank.save(4)  # the second of them by what the first has said is free
    for step in (3, 4):
        assert rank.client.wait(step, level="committed", timeout_s=30).reached
        assert is_saved(tier.url, step)


def test_all_ranks_make_one_checkpoint(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    ranks = [keepers.rank(config_of(tier), rank=rank, world_size=3) for rank in range(3)]
    assert len(keepers.pids) == 1
    for each in ranks[:2]:
        each.save(5)
    assert ranks[0].client.wait(5, level="sealed", timeout_s=30).reached
    assert not ranks[0].client.wait(5, level="protected", timeout_s=0.2).reached
    ranks[2].save(5)
    assert ranks[0].client.wait(5, level="committed", timeout_s=30).state == "PROTECTED"
    assert is_saved(tier.url, 5, world_size=3)


def test_tiers_have_intervals_of_their_own_and_durable_goes_to_all(keepers: Keepers, tmp_path: Path) -> None:
    often, seldom = local(tmp_path), local(tmp_path / "far", every=3)
    seldom = type(seldom)(url=seldom.url, name="far", every=3)
    rank = keepers.rank(config_of(often, seldom))
    for step in (1, 2, 3, 4):
        rank.save(step)
        assert rank.client.wait(step, level="committed", timeout_s=30).reached
    rank.save(5, durable=True)
    assert rank.client.wait(5, level="committed", tier="far", timeout_s=30).reached
    status = rank.client.wait(2, level="committed", tier="far", timeout_s=30)
    assert not status.reached and "not due" in status.reason
    rank.client.close(flush=True)
    assert set(committed(seldom.url)) == {1, 4, 5}
    assert is_saved(seldom.url, 4) and is_saved(seldom.url, 5)


def test_a_step_due_nowhere_stays_in_memory_and_a_wait_says_so(keepers: Keepers) -> None:
    rank = keepers.rank(config_of())
    rank.save(1)
    assert rank.client.wait(1, level="protected", timeout_s=30).reached
    status = rank.client.wait(1, level="committed", timeout_s=30)
    assert not status.reached and "not due" in status.reason
    assert [(each.step, each.protected) for each in rank.client.sealed_steps()] == [(1, True)]


def test_waiting_for_a_step_that_nobody_saves_ends_at_once(keepers: Keepers, tmp_path: Path) -> None:
    rank = keepers.rank(config_of(local(tmp_path)))
    assert "does not know" in rank.client.wait(99, level="committed", timeout_s=30).reason
    assert "not in memory" in rank.client.wait(99, level="sealed", timeout_s=30).reason


def test_saving_a_step_again_replaces_it(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    ranks = [keepers.rank(config_of(tier), rank=rank, world_size=2) for rank in range(2)]
    for _ in range(2):
        for each in ranks:
            each.save(3)
        assert ranks[0].client.wait(3, level="committed", timeout_s=30).reached
    assert is_saved(tier.url, 3, world_size=2)
    assert ranks[0].client.status()["tiers"][0]["num_committed"] == 2


def test_a_run_that_goes_back_saves_smaller_steps(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    rank = keepers.rank(config_of(tier))
    for step in (10, 11, 5, 6):
        rank.save(step)
        assert rank.client.wait(step, level="committed", timeout_s=30).reached
    assert next(iter(rank.client.sealed_steps())).step == 6


def test_what_is_in_memory_can_be_read_with_its_checksums(keepers: Keepers) -> None:
    ranks = [keepers.rank(config_of(), rank=rank, world_size=2) for rank in range(2)]
    for rank in ranks:
        rank.save(4)
    assert ranks[1].client.wait(4, level="protected", timeout_s=30).reached
    pinned = ranks[0].client.pin(4)
    assert [each.writer for each in pinned] == [0, 1]
    for each in pinned:
        assert bytes(each.memory[: 1 << 20]) == pattern(4, each.writer, 1 << 20).tobytes()
        assert each.memory.readonly and len(each.crcs) == 1 and len(each.memory) == STRIDE
        assert each.objects == {"step": 4, "rank": each.writer}
        assert int.from_bytes(each.memory[EXTENT_BYTES : EXTENT_BYTES + 4], "little") == each.crcs[0]
    ranks[0].client.unpin(4)
    with pytest.raises(KeeperRefused, match="not in this node's memory"):
        ranks[0].client.pin(5)


def test_a_pinned_step_is_not_overwritten(keepers: Keepers) -> None:
    rank = keepers.rank(config_of(), num_slots=2)
    rank.save(1)
    rank.client.pin(1)
    rank.save(2)
    assert rank.client.wait(2, level="protected", timeout_s=30).reached
    assert not rank.save(3, policy="skip")
    rank.client.unpin(1)
    assert rank.save(4, policy="skip")


def test_a_snapshot_with_extents_missing_is_refused(keepers: Keepers, tmp_path: Path) -> None:
    rank = keepers.rank(config_of(local(tmp_path)), nbytes=2 * EXTENT_BYTES)
    slot = rank.open(1)
    assert slot
    rank.client.copied(slot, [1])
    with pytest.raises(KeeperRefused, match="not complete"):
        rank.client.seal(slot)
    assert "extents were not copied" in rank.client.wait(1, level="committed", timeout_s=30).reason
    assert rank.save(2)
    assert rank.client.wait(2, level="committed", timeout_s=30).reached


def test_an_invalidated_snapshot_is_lost_for_all_and_the_next_works(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    ranks = [keepers.rank(config_of(tier), rank=rank, world_size=2) for rank in range(2)]
    ranks[0].save(1)
    slot = ranks[1].open(1)
    assert slot
    ranks[1].client.invalidate(slot, "a tensor changed")
    assert "a tensor changed" in ranks[0].client.wait(1, level="committed", timeout_s=30).reason
    until(lambda: "step_lost" in ranks[0].events(), "notice")
    for each in ranks:
        each.save(2)
    assert ranks[0].client.wait(2, level="committed", timeout_s=30).reached
    assert set(committed(tier.url)) == {2}


@pytest.mark.parametrize("policy", ["skip", "drop", "block"])
def test_back_pressure_on_a_slow_disk_is_what_the_policy_says(
    keepers: Keepers, tmp_path: Path, policy: str
) -> None:
    tier = local(tmp_path, bytes_per_s=5e5)  # two seconds a step
    rank = keepers.rank(config_of(tier))
    taken = [step for step in (1, 2, 3) if rank.save(step, policy=policy)]
    for step in taken:
        rank.client.wait(step, level="committed", timeout_s=30)
    rank.client.close(flush=True)
    if policy == "skip":
        assert taken == [1, 2] and "skipped" in rank.events()
        assert set(committed(tier.url)) == {1, 2}
    elif policy == "drop":
        assert taken == [1, 2, 3] and "step_lost" in rank.events()
        assert 3 in committed(tier.url) and 1 not in committed(tier.url)
    else:
        assert taken == [1, 2, 3]
        assert set(committed(tier.url)) == {1, 2, 3}


def test_a_skip_on_one_rank_is_a_skip_on_all(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    ranks = [keepers.rank(config_of(tier), rank=rank, world_size=2, num_slots=2 - rank) for rank in range(2)]
    for each in ranks:
        each.save(1)
    assert ranks[0].client.wait(1, level="committed", timeout_s=30).reached
    ranks[1].client.pin(1)
    assert ranks[0].save(2) and not ranks[1].save(2, policy="skip")
    assert "no slot is free" in ranks[0].client.wait(2, level="committed", timeout_s=30).reason
    ranks[1].client.unpin(1)
    for each in ranks:
        assert each.save(3)
    assert ranks[0].client.wait(3, level="committed", timeout_s=30).reached
    assert set(committed(tier.url)) == {1, 3}


def test_a_state_larger_than_its_slot_streams_to_disk(keepers: Keepers, tmp_path: Path) -> None:
    near, far = local(tmp_path), local(tmp_path / "far")
    far = type(far)(url=far.url, name="far")
    nbytes = 5 * EXTENT_BYTES + 777
    rank = keepers.rank(config_of(near, far), nbytes=nbytes, slot_extents=2, num_slots=1)
    for step in (1, 2):
        slot = rank.open(step)
        assert slot and slot.streams and slot.num_extents == 2
        rank.fill(slot)
        rank.client.seal(slot)
        assert rank.client.wait(step, level="committed", tier="far", timeout_s=40).reached
    assert rank.client.sealed_steps() == ()
    assert is_saved(near.url, 2, nbytes=nbytes) and is_saved(far.url, 2, nbytes=nbytes)


def test_a_state_larger_than_its_slot_is_skipped_where_no_tier_is_due(keepers: Keepers) -> None:
    rank = keepers.rank(config_of(), nbytes=3 * EXTENT_BYTES, slot_extents=2)
    assert rank.open(1) is None
    until(lambda: any("no tier is due" in str(notice["text"]) for notice in rank.notices), "reason")


def test_closing_with_flush_waits_for_the_disk_and_ends_the_keeper(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path, bytes_per_s=2e6)
    rank = keepers.rank(config_of(tier))
    rank.save(1)
    rank.client.close(flush=True)
    assert is_saved(tier.url, 1)
    (pid,) = keepers.pids
    until(lambda: not alive(pid), "end of the keeper")
    assert os.listdir(tmp_path / "run" / "distrain") == []


def test_a_keeper_that_should_end_writes_what_it_has_first(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path, bytes_per_s=2e6)
    rank = keepers.rank(config_of(tier))
    rank.save(1)
    rank.client.close(flush=False)
    (pid,) = keepers.pids
    until(lambda: not alive(pid), "end of the keeper")
    assert is_saved(tier.url, 1)


def test_without_a_keeper_and_without_leave_to_start_one_there_is_a_clear_error(keepers: Keepers) -> None:
    with pytest.raises(KeeperLost, match="no keeper answers"):
        KeeperClient.connect(
            job="other",
            rank=0,
            local_rank=0,
            world_size=1,
            slot_bytes=STRIDE,
            num_slots=1,
            config=config_of(),
            start=False,
            timeout_s=0.2,
            environ=keepers.environ,
        )


def test_a_rank_with_another_configuration_is_refused(keepers: Keepers, tmp_path: Path) -> None:
    keepers.rank(config_of(local(tmp_path)), rank=0, world_size=2)
    with pytest.raises(KeeperRefused, match="another configuration"):
        keepers.rank(config_of(), rank=1, world_size=2)


def test_more_memory_than_there_is_is_refused_before_anything_is_touched(keepers: Keepers) -> None:
    with pytest.raises(KeeperRefused, match="not enough memory"):
        keepers.rank(config_of(), slot_extents=1 << 16, num_slots=1)


def test_the_keepers_events_are_recorded(keepers: Keepers, tmp_path: Path) -> None:
    rank = keepers.rank(config_of(local(tmp_path), events=str(tmp_path / "events")))
    rank.save(1)
    assert rank.client.wait(1, level="committed", timeout_s=30).reached
    assert "keeper.committed" in (tmp_path / "events" / "keeper-0.jsonl").read_text()
