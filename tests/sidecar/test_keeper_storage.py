"""Disks that are full, broken, read-only, slow or dead: training goes on, and says so."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distrain.checkpoint.keeper_config import TierConfig
from distrain.checkpoint.layout import EXTENT_BYTES
from distrain.core.sidecar_client import KeeperRefused
from helpers.keepers import Fault, Keepers, Rank, alive, committed, config_of, is_saved, local, until

pytestmark = pytest.mark.processes

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB: room for one checkpoint of one extent, not for two."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


NBYTES = EXTENT_BYTES


def goes_on(rank: Rank, *steps: int) -> None:
    """Training takes its snapshots as ever."""
    for step in steps:
        start = time.monotonic()
        assert rank.save(step, policy="drop")
        assert rank.client.wait(step, level="protected", timeout_s=30).reached
        assert time.monotonic() - start < 20


@needs_root
def test_a_full_disk_costs_its_checkpoints_until_there_is_room_again(keepers: Keepers, mounted: Path) -> None:
    ballast = mounted / "ballast"
    ballast.write_bytes(bytes(12 << 20))
    tier = TierConfig(url=str(mounted / "run"), name="local")
    rank = keepers.rank(config_of(tier, num_attempts=2), nbytes=NBYTES)
    goes_on(rank, 1, 2)
    status = rank.client.wait(2, level="committed", timeout_s=30)
    assert not status.reached and "ENOSPC" in status.reason
    until(lambda: "flush_failed" in rank.events(), "notice")
    ballast.unlink()
    goes_on(rank, 3)
    assert rank.client.wait(3, level="committed", timeout_s=30).reached
    assert is_saved(tier.url, 3, nbytes=NBYTES)


@needs_root
def test_on_a_disk_with_room_for_one_checkpoint_that_one_stays(keepers: Keepers, mounted: Path) -> None:
    tier = TierConfig(url=str(mounted / "run"), name="local", keep_last=1)
    rank = keepers.rank(config_of(tier, num_attempts=2), nbytes=NBYTES)
    goes_on(rank, 1)
    assert rank.client.wait(1, level="committed", timeout_s=30).reached
    goes_on(rank, 2)
    assert "ENOSPC" in rank.client.wait(2, level="committed", timeout_s=30).reason
    assert is_saved(tier.url, 1, nbytes=NBYTES)


@needs_root
def test_a_read_only_folder_is_named(keepers: Keepers, mounted: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    rank = keepers.rank(config_of(TierConfig(url=str(mounted / "run"), name="local"), num_attempts=1))
    goes_on(rank, 1, 2)
    assert "EROFS" in rank.client.wait(2, level="committed", timeout_s=30).reason


def test_a_folder_that_is_a_file_is_named(keepers: Keepers, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tier = TierConfig(url=str(tmp_path / "file" / "run"), name="local")
    rank = keepers.rank(config_of(tier, num_attempts=1))
    goes_on(rank, 1, 2)
    assert "ENOTDIR" in rank.client.wait(2, level="committed", timeout_s=30).reason


@pytest.mark.parametrize("name", ["EIO", "EDQUOT", "ENOSPC"])
@pytest.mark.parametrize(
    "point", ["checkpoint.pwrite", "checkpoint.fsync", "checkpoint.write", "checkpoint.rename"]
)
def test_an_error_that_passes_costs_one_attempt(
    keepers: Keepers, tmp_path: Path, name: str, point: str
) -> None:
    tier = local(tmp_path)
    keepers.start_keeper(Fault(point, name))
    rank = keepers.rank(config_of(tier))
    goes_on(rank, 1)
    assert rank.client.wait(1, level="committed", timeout_s=30).reached
    (counters,) = rank.client.status()["tiers"]
    assert (counters["num_failed"], counters["num_given_up"]) == (1, 0) and name in counters["last_error"]
    assert is_saved(tier.url, 1)


def test_an_error_that_stays_is_given_up_and_told_and_the_other_tier_gets_it_from_memory(
    keepers: Keepers, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    broken = TierConfig(url=str(tmp_path / "file" / "run"), name="broken")
    far = TierConfig(url=str(tmp_path / "far"), name="far")
    rank = keepers.rank(config_of(broken, far, num_attempts=2))
    goes_on(rank, 1)
    assert rank.client.wait(1, level="committed", tier="far", timeout_s=30).reached
    assert "ENOTDIR" in rank.client.wait(1, level="committed", tier="broken", timeout_s=30).reason
    assert is_saved(far.url, 1)
    told = [notice for notice in rank.notices if notice["event"] == "flush_failed"]
    assert [notice["level"] for notice in told] == ["warning", "error"]


def test_without_o_direct_everything_works(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    keepers.start_keeper(Fault("checkpoint.open_direct", "EINVAL", always=True))
    rank = keepers.rank(config_of(tier), nbytes=2 * NBYTES + 1)
    goes_on(rank, 1)
    assert rank.client.wait(1, level="committed", timeout_s=30).reached
    assert is_saved(tier.url, 1, nbytes=2 * NBYTES + 1)


def test_a_disk_that_does_not_answer_holds_up_nothing_but_itself(keepers: Keepers, tmp_path: Path) -> None:
    keepers.start_keeper(Fault("checkpoint.pwrite", "1000", always=True))
    rank = keepers.rank(config_of(local(tmp_path)), num_slots=3)
    pid = int(rank.client.status()["pid"])
    assert rank.save(1, policy="skip") and rank.save(2, policy="skip") and rank.save(3, policy="skip")
    assert not rank.save(4, policy="skip")
    assert rank.client.status()["tiers"][0]["num_prepared"] == 0
    assert not rank.client.wait(1, level="committed", timeout_s=0.2).reached
    rank.client.close(flush=False)
    os.kill(pid, 9)
    until(lambda: not alive(pid), "end of the keeper")


@needs_root
def test_a_small_dev_shm_is_of_no_importance(keepers: Keepers, tmp_path: Path) -> None:
    tier = local(tmp_path)
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("cannot make a mount namespace")
    shrink = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    keepers.start_keeper(prefix=["unshare", "-m", "sh", "-c", shrink, "sh"])
    rank = keepers.rank(config_of(tier), nbytes=5 * NBYTES, num_slots=2)  # 160 MiB of memory
    goes_on(rank, 1)
    assert rank.client.wait(1, level="committed", timeout_s=30).reached
    assert is_saved(tier.url, 1, nbytes=5 * NBYTES)


def test_a_broken_disk_ends_a_stream_with_a_reason_and_the_next_works(
    keepers: Keepers, tmp_path: Path
) -> None:
    tier, nbytes = local(tmp_path), 4 * NBYTES
    keepers.start_keeper(Fault("checkpoint.pwrite", "EIO", on_hit=2))
    rank = keepers.rank(config_of(tier), nbytes=nbytes, slot_extents=1, num_slots=1)
    slot = rank.open(1)
    assert slot and slot.streams
    with pytest.raises(KeeperRefused):
        rank.fill(slot)
        rank.client.seal(slot)
    assert "EIO" in rank.client.wait(1, level="committed", timeout_s=30).reason
    slot = rank.open(2)
    assert slot
    rank.fill(slot)
    rank.client.seal(slot)
    assert rank.client.wait(2, level="committed", timeout_s=30).reached
    assert set(committed(tier.url)) == {2} and is_saved(tier.url, 2, nbytes=nbytes)


def test_an_object_store_gets_what_is_on_disk(keepers: Keepers, tmp_path: Path) -> None:
    far = TierConfig(url=f"local://{tmp_path}/far", name="far")  # fsspec's, which cannot be renamed in
    rank = keepers.rank(config_of(local(tmp_path), far), nbytes=NBYTES + 1)
    goes_on(rank, 1)
    assert rank.client.wait(1, level="committed", tier="far", timeout_s=30).reached
    assert is_saved(far.url, 1, nbytes=NBYTES + 1)
    assert any(name.startswith("step-00000001-") for name in os.listdir(tmp_path / "far"))
