"""Saving, committing and collecting: what is there afterwards, and what is left when a process is killed anywhere."""

import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import distrain.checkpoint
from distrain.checkpoint.candidates import candidates
from distrain.checkpoint.collect import Retention, collect
from distrain.checkpoint.commit import begin, commit, prepared
from distrain.checkpoint.errors import DamageError, StorageError
from distrain.checkpoint.locate import locate
from distrain.checkpoint.tensors import TensorReader
from distrain.checkpoint.tiers import posix
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.core.failpoints import FAILPOINTS
from distrain.core.protocols import ShardBox
from helpers.checkpoints import Shard, write_checkpoint

WORLD = 2
READS = {"checkpoint.read", "checkpoint.pread", "checkpoint.open_direct"}
FILES = ("blob", "commit", "collect", "tiers/posix")
"""those that write"""


def shards(value: float) -> list[list[Shard]]:
    """One tensor in two halves that are all ``value``."""
    half = np.full((3, 5), value, np.float32)
    boxes = [
        ShardBox(fqn="w", dtype="float32", global_shape=(6, 5), offset=(3 * rank, 0), shape=(3, 5))
        for rank in range(WORLD)
    ]
    return [[(box, half)] for box in boxes]


def save(root: Path, step: int, value: float, *, attempt: str = "a0") -> Path:
    return write_checkpoint(root, shards(value), step=step, attempt=attempt, objects={"value": value})


def restored(root: Path) -> tuple[int, float]:
    """Step and value of the newest whole checkpoint, of which all data is read and checked."""
    found = locate(root)
    values = np.unique(TensorReader(found.storage, found.folder, found.manifest).read("w"))
    assert values.size == 1, "a mix of two checkpoints"
    return found.manifest.step, float(values[0])


def test_the_newest_checkpoint_is_the_one_to_restore(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step, step)
    assert restored(tmp_path) == (10, 10.0)
    assert [c.step for c in candidates(PosixStorage(tmp_path))] == [10, 9, 2]
    assert (tmp_path / "latest").read_text() == "step-00000009\n"
    assert not list(tmp_path.glob(".tmp*"))


def test_another_attempt_at_a_step_takes_its_place(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    save(tmp_path, 1, 2.0, attempt="b")
    assert restored(tmp_path) == (1, 2.0)
    assert collect(PosixStorage(tmp_path), Retention()) == [".old-step-00000001-b"]
    assert restored(tmp_path) == (1, 2.0)


def test_nothing_is_committed_before_every_writer_has_prepared(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path)
    with (
        FAILPOINTS.armed("checkpoint.record", StorageError("write", OSError(5, "gone")), writer=1),
        pytest.raises(StorageError),
    ):
        save(tmp_path, 1, 1.0)
    assert set(prepared(storage, 1, "a0")) == {0}
    with pytest.raises(DamageError, match="set of writers"):
        commit(storage, 1, "a0", mesh={})
    assert list(candidates(storage)) == []


def test_a_blob_that_is_cut_after_it_was_prepared_keeps_the_commit_from_happening(tmp_path: Path) -> None:
    blob = tmp_path / ".tmp-step-00000001-a0/data/1/0"
    with (
        FAILPOINTS.armed("checkpoint.prepared", lambda context: os.truncate(blob, 100), writer=1),
        pytest.raises(DamageError, match="another size"),
    ):
        save(tmp_path, 1, 1.0)
    assert list(candidates(PosixStorage(tmp_path))) == []


def test_latest_is_only_a_hint(tmp_path: Path) -> None:
    save(tmp_path, 1, 1.0)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    save(tmp_path, 2, 2.0)
    assert restored(tmp_path) == (2, 2.0)


def test_an_attempts_name_cannot_lead_elsewhere(tmp_path: Path) -> None:
    for attempt in ("", "../x", "a/b", "A", "a" * 33):
        with pytest.raises(ValueError, match="an attempt is"):
            begin(PosixStorage(tmp_path), 1, attempt)


class NoRename(PosixStorage):
    """A medium like an object store, where a folder cannot change its name."""

    atomic_rename = False

    def rename(self, old: str, new: str) -> None:
        raise AssertionError("this medium cannot rename")


def test_without_rename_the_manifest_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helpers.checkpoints.PosixStorage", NoRename)
    storage = NoRename(tmp_path)
    folder = save(tmp_path, 1, 1.0)
    assert folder.name == "step-00000001-a0"
    with FAILPOINTS.armed("checkpoint.manifest", InterruptedError()), pytest.raises(InterruptedError):
        save(tmp_path, 2, 2.0)
    assert [c.step for c in candidates(storage)] == [1]
    save(tmp_path, 2, 2.0, attempt="b")
    assert restored(tmp_path) == (2, 2.0)
    with FAILPOINTS.armed("checkpoint.delete", InterruptedError()), pytest.raises(InterruptedError):
        collect(storage, Retention(keep_last=1))
    assert [c.step for c in candidates(storage)] == [2], "a half deleted checkpoint is none"


# Kills ---------------------------------------------------------------------------------------------------------------


def points() -> set[str]:
    """All failpoints in the source of what writes."""
    folder = Path(distrain.checkpoint.__file__).parent
    source = "".join((folder / f"{name}.py").read_text() for name in FILES)
    return set(re.findall(r'hit\("(checkpoint\.\w+)"', source)) - READS


def hits_of(work: Callable[[], object]) -> Counter[str]:
    """How often ``work`` passes each point."""
    counted: Counter[str] = Counter()
    with ExitStack() as stack:
        armed = {name: stack.enter_context(FAILPOINTS.armed(name, lambda c: None)) for name in points()}
        work()
        counted.update({name: point.hits for name, point in armed.items()})
    return counted


def killed_at(name: str, on_hit: int, work: Callable[[], object]) -> None:
    """Do ``work`` in a process of its own, which is killed when it passes the point."""
    if (pid := os.fork()) == 0:
        try:
            FAILPOINTS.arm(name, lambda context: os.kill(os.getpid(), signal.SIGKILL), on_hit=on_hit)
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, (
        f"{name} was not passed {on_hit} times"
    )


def every_kill(
    work: Callable[[Path], object], prepare: Callable[[Path], object], tmp: Path
) -> Iterator[tuple[str, Path]]:
    """Kill ``work`` at each hit of each point, each time in a new folder that was prepared."""
    prepare(tmp / "prepared")
    shutil.copytree(tmp / "prepared", tmp / "count", copy_function=os.link)  # no file is ever written again
    for name, count in sorted(hits_of(lambda: work(tmp / "count")).items()):
        for on_hit in range(1, count + 1):
            root = tmp / f"{name}-{on_hit}"
            shutil.copytree(tmp / "prepared", root, copy_function=os.link)
            killed_at(name, on_hit, partial(work, root))
            yield name, root


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process leaves the page cache behind: no need to wait for a disk hundreds of times."""
    monkeypatch.setattr(posix, "_O_DIRECT", 0)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


AFTER = {"checkpoint.committed", "checkpoint.latest"}
"""points behind the commit"""


@pytest.mark.processes
def test_a_kill_anywhere_while_saving_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, quick_disk: None
) -> None:
    seen = set()
    for name, root in every_kill(lambda r: save(r, 2, 2.0), lambda r: save(r, 1, 1.0), tmp_path):
        outcome = restored(root)
        assert outcome in {(1, 1.0), (2, 2.0)}
        if name in AFTER:
            assert outcome == (2, 2.0)
        assert [c.step for c in candidates(PosixStorage(root)) if c.manifest][-1] == 1, (
            "the older one is lost"
        )
        if (name, outcome[0]) in seen:
            continue
        seen.add((name, outcome[0]))
        save(root, 3, 3.0, attempt="b1")
        collect(PosixStorage(root), Retention(keep_last=1))
        assert restored(root) == (3, 3.0)
        assert sorted(path.name for path in root.glob("*step*")) == ["step-00000003"], "rubbish is left"
    assert {name for name, _ in seen} >= {"checkpoint.extent", "checkpoint.record", "checkpoint.publish"}
    assert {step for _, step in seen} == {1, 2}


@pytest.mark.processes
def test_a_kill_anywhere_while_a_step_is_saved_again_leaves_one_of_the_two(
    tmp_path: Path, quick_disk: None
) -> None:
    outcomes = set()
    for name, root in every_kill(
        lambda r: save(r, 1, 2.0, attempt="b1"), lambda r: save(r, 1, 1.0), tmp_path
    ):
        outcome = restored(root)
        assert outcome in {(1, 1.0), (1, 2.0)}
        if name in AFTER:
            assert outcome == (1, 2.0)
        if outcome not in outcomes:
            outcomes.add(outcome)
            save(root, 1, 3.0, attempt="c1")
            assert restored(root) == (1, 3.0)
    assert len(outcomes) == 2


@pytest.mark.processes
def test_a_kill_anywhere_while_collecting_never_touches_what_is_kept(
    tmp_path: Path, quick_disk: None
) -> None:
    def prepare(root: Path) -> None:
        for step in (1, 2, 3):
            save(root, step, step)
        save(root, 3, 3.5, attempt="b1")

    names = set()
    for name, root in every_kill(
        lambda r: collect(PosixStorage(r), Retention(keep_last=1)), prepare, tmp_path
    ):
        names.add(name)
        assert restored(root) == (3, 3.5)
        assert all(c.manifest for c in candidates(PosixStorage(root))), "half a checkpoint looks like one"
        collect(PosixStorage(root), Retention(keep_last=1))
        assert sorted(path.name for path in root.glob("*step*")) == ["step-00000003"]
    assert names >= {"checkpoint.collect", "checkpoint.discard", "checkpoint.rename", "checkpoint.delete"}


def test_every_point_that_can_be_killed_is_passed_by_these_tests(tmp_path: Path) -> None:
    def everything() -> None:
        save(tmp_path, 1, 1.0)
        save(tmp_path, 1, 2.0, attempt="b1")
        collect(PosixStorage(tmp_path), Retention(keep_last=1))

    hits = hits_of(everything)
    assert {name for name in points() if not hits[name]} == set()
