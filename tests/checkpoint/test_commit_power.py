"""Power cuts: whatever had not reached the disk yet, what is restored is the last checkpoint or the new one."""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distrain.checkpoint.blob import data_path
from distrain.checkpoint.candidates import candidates
from distrain.checkpoint.collect import Retention, collect
from distrain.checkpoint.layout import EXTENT_BYTES
from distrain.checkpoint.tensors import TensorReader
from distrain.checkpoint.tiers import posix
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.core.failpoints import FAILPOINTS
from distrain.core.protocols import ShardBox
from helpers.checkpoints import write_checkpoint
from helpers.power import Journal

RUN = "runs/7"
"""a root that does not exist yet, nor does its parent"""


def save(root: Path, step: int, value: float, *, attempt: str = "a0") -> None:
    half = np.full((3, 5), value, np.float32)
    boxes = [
        ShardBox(fqn="w", dtype="float32", global_shape=(6, 5), offset=(3 * rank, 0), shape=(3, 5))
        for rank in range(2)
    ]
    write_checkpoint(root, [[(box, half)] for box in boxes], step=step, attempt=attempt)


def save_without_hint(root: Path, step: int, value: float) -> None:
    """A save that cannot write ``latest``."""
    with FAILPOINTS.armed("checkpoint.write", OSError(errno.EIO, "broken"), path="latest") as point:
        save(root, step, value)
    assert point.fired


class Restorer:
    """Restores; data that it has read once, every written byte of it, it does not read again."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, ...], float] = {}

    def restored(self, root: Path) -> float | None:
        """The value in the newest checkpoint, of which all is checked; None if there is none."""
        storage = PosixStorage(root)
        found = list(candidates(storage))
        refused = [candidate.refused for candidate in found if candidate.refused]
        assert refused == [], "half a checkpoint looks like one"
        if not found or found[0].manifest is None:
            return None
        blobs = [root / data_path(found[0].folder, writer.writer) for writer in found[0].manifest.writers]
        written = tuple(page(blob, start) for blob in blobs for start in (0, EXTENT_BYTES))
        if written not in self._known:
            values = np.unique(TensorReader(storage, found[0].folder, found[0].manifest).read("w"))
            assert values.size == 1, "a mix of two checkpoints"
            self._known[written] = float(values[0])
        return self._known[written]


def page(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(4096)


ACTIONS: list[tuple[Callable[[Path], object], float]] = [
    (lambda root: save(root, 1, 1.0), 1.0),
    (lambda root: save(root, 2, 2.0), 2.0),
    (lambda root: save(root, 2, 2.5, attempt="b1"), 2.5),
    (lambda root: collect(PosixStorage(root), Retention(keep_last=1)), 2.5),
    (lambda root: save_without_hint(root, 3, 3.0), 3.0),
]
"""what is done, and what must be restored afterwards"""


@pytest.fixture(autouse=True)
def _through_the_page_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """O_DIRECT would wait for a real disk hundreds of times."""
    monkeypatch.setattr(posix, "_O_DIRECT", 0)


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Journal, list[int]]:
    """Notes of all actions, and where in them each was over."""
    base = tmp_path / "base"
    base.mkdir()
    notes, ends = Journal(base), []
    with monkeypatch.context() as patch:
        patch.setattr(posix, "os", notes)
        patch.setattr(posix, "shutil", SimpleNamespace(rmtree=notes.rmtree))
        for act, _ in ACTIONS:
            act(base / RUN)
            ends.append(len(notes.ops))
    return notes, ends


def test_after_a_power_cut_anywhere_the_last_or_the_new_checkpoint_is_restored(
    tmp_path: Path, journal: tuple[Journal, list[int]]
) -> None:
    notes, ends = journal
    lucky = random.Random(0)
    policies: list[Callable[[int], bool]] = [
        lambda number: False,
        lambda number: True,
        lambda number: notes.ops[number].kind in ("data", "cut"),
        lambda number: notes.ops[number].kind not in ("data", "cut"),
        lambda number: lucky.random() < 0.5,
    ]
    outcomes: dict[str, float | None] = {}
    restorer = Restorer()
    for after in range(len(notes.ops) + 1):
        done = sum(end <= after for end in ends)
        allowed = {None if done == 0 else ACTIONS[done - 1][1], ACTIONS[min(done, len(ACTIONS) - 1)][1]}
        for keeps in policies:
            state = notes.leave(tmp_path / "after", after=after, keeps=keeps)
            if state not in outcomes:
                outcomes[state] = restorer.restored(tmp_path / "after" / state / RUN)
            assert outcomes[state] in allowed, f"after operation {after} of {len(notes.ops)}: {state}"
    assert set(outcomes.values()) == {None, 1.0, 2.0, 2.5, 3.0}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_model_shows_what_is_lost_without_fsync(
    tmp_path: Path, journal: tuple[Journal, list[int]], kind: str
) -> None:
    notes, ends = journal
    files = {op.node for op in notes.ops if op.kind == "data"}
    notes.ops = [
        op for op in notes.ops[: ends[0]] if op.kind != "sync" or (op.node in files) != (kind == "file")
    ]
    state = notes.leave(tmp_path / "after", after=len(notes.ops), keeps=lambda number: False)
    assert not any(
        candidate.manifest for candidate in candidates(PosixStorage(tmp_path / "after" / state / RUN))
    )
