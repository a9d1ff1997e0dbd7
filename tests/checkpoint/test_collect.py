"""Retention: what it keeps, what it deletes, and that the last good checkpoint is never among that."""

import os
from pathlib import Path

import numpy as np
import pytest

from distrain.checkpoint.candidates import Candidate, candidates
from distrain.checkpoint.collect import Retention, collect, unwanted
from distrain.checkpoint.commit import begin
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.checkpoint.verify import verify
from distrain.core.errors import ConfigError
from helpers.checkpoints import whole, write_checkpoint


def save(root: Path, *steps: int, attempt: str = "a0") -> None:
    for step in steps:
        shard = whole("w", "float32", np.full(5, step, np.float32))
        write_checkpoint(root, [[shard]], step=step, attempt=attempt)


def steps(root: Path) -> list[int]:
    return [candidate.step for candidate in candidates(PosixStorage(root))]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [6, 5, 4]),
        (Retention(keep_last=1), [6]),
        (Retention(keep_last=2, keep_every=3), [6, 5, 3]),
        (Retention(keep_last=100), [6, 5, 4, 3, 2, 1]),
        (Retention(keep_last=1, keep_every=1), [6, 5, 4, 3, 2, 1]),
    ],
)
def test_the_newest_and_the_multiples_are_kept(tmp_path: Path, retention: Retention, kept: list[int]) -> None:
    save(tmp_path, *range(1, 7))
    assert unwanted(PosixStorage(tmp_path), retention) == [
        f"step-{step:08d}" for step in range(6, 0, -1) if step not in kept
    ]
    assert steps(tmp_path) == [6, 5, 4, 3, 2, 1], "asking deletes nothing"
    deleted = collect(PosixStorage(tmp_path), retention)
    assert steps(tmp_path) == kept
    assert len(deleted) == 6 - len(kept)


def test_pinned_steps_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    collect(PosixStorage(tmp_path), Retention(keep_last=1), pinned=[1])
    assert steps(tmp_path) == [3, 1]


def test_damaged_ones_do_not_count_and_newer_ones_are_left_for_repair(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4)
    for step in (1, 3, 4):
        os.truncate(tmp_path / f"step-{step:08d}/data/0/0", 10)
    assert collect(PosixStorage(tmp_path), Retention(keep_last=1)) == ["step-00000001"]
    assert steps(tmp_path) == [4, 3, 2]


def test_without_a_good_one_nothing_is_deleted(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    begin(PosixStorage(tmp_path), 1, "zz")
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}/manifest.json").unlink()
    assert collect(PosixStorage(tmp_path), Retention(keep_last=1)) == []
    assert steps(tmp_path) == [2, 1]


def test_damage_inside_counts_where_the_caller_looks_inside(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    with (tmp_path / "step-00000003/data/0/0").open("r+b") as file:
        file.write(b"x")
    storage = PosixStorage(tmp_path)

    def is_good(candidate: Candidate) -> bool:
        return verify(storage, candidate.folder).is_good

    assert collect(storage, Retention(keep_last=1), is_good=is_good) == ["step-00000001"]
    assert steps(tmp_path) == [3, 2]


def test_rubbish_of_crashes_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    save(tmp_path, 3)
    save(tmp_path, 3, attempt="b1")
    for step, attempt in ((2, "dead"), (3, "dead"), (3, "slow"), (4, "next")):
        begin(storage, step, attempt)
    (tmp_path / ".trash-step-00000001").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "step-3").mkdir()
    deleted = collect(storage, Retention(), in_flight=[".tmp-step-00000003-slow"])
    assert sorted(deleted) == [
        ".old-step-00000003-b1",
        ".tmp-step-00000002-dead",
        ".tmp-step-00000003-dead",
        ".trash-step-00000001",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".tmp-step-00000003-slow",
        ".tmp-step-00000004-next",
        "latest",
        "notes.txt",
        "step-00000003",
        "step-3",
    ]


def test_a_replaced_checkpoint_stays_while_its_successor_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1, attempt="b1")
    os.truncate(tmp_path / "step-00000001/data/0/0", 10)
    assert collect(PosixStorage(tmp_path), Retention()) == []
    assert [c.folder for c in candidates(PosixStorage(tmp_path)) if c.manifest] == [".old-step-00000001-b1"]


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"keep_last": -1}, {"keep_every": -2}])
def test_retention_that_keeps_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="retention"):
        Retention(**wrong)
