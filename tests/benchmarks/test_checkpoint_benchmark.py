"""The checkpoint benchmark: contenders are taken at their word, and who loses bytes is no peer."""

import io
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.checkpoint import (
    COMPARISONS,
    EAGER,
    LAZY,
    RAW,
    Comparison,
    best_peer,
    compare,
    contenders,
    growth,
    jobs,
    measure,
)
from benchmarks.checkpoint_contenders import dcp, ours, plain_files
from benchmarks.checkpoint_contenders.base import Factory, Job, Training
from benchmarks.harness import Row, Session

TINY = Job(2, (64, 64), 0.01, first_save_s=0.0)


def rows(**factories: Factory) -> dict[str, Row]:
    session = Session("test", False, 2, None, Console(file=io.StringIO()))
    return {row["contender"]: row for row in measure("large", TINY, factories, session)}


class Memory:
    """A contender whose disk is a dict; ``what`` names what it does wrong."""

    overlaps = True
    what = "nothing"

    def __init__(self, training: Training, folder: Path) -> None:
        self._training = training
        self._disk: dict[int, dict[str, Tensor]] = {}
        self._step = 0

    def save(self, step: int) -> None:
        self._step = step
        if self.what != "writes late":
            self._write()

    def fence(self) -> None:
        """Whoever is right has copied by now."""

    def durable(self) -> None:
        if self.what == "writes late":
            self._write()

    def restore(self, step: int) -> None:
        for name, tensor in self._training.tensors().items():
            if self.what != "forgets" or name != "w1.exp_avg":
                tensor.copy_(self._disk[step][name])

    def close(self) -> None:
        """Nothing runs."""

    def _write(self) -> None:
        self._disk = {self._step: {name: t.clone() for name, t in self._training.tensors().items()}}


class WritesLate(Memory):
    what = "writes late"


class Forgets(Memory):
    what = "forgets"


class Breaks(Memory):
    def durable(self) -> None:
        raise OSError("no space left on the device")


@pytest.mark.ranks
@pytest.mark.slow
def test_who_loses_bytes_is_marked_and_who_breaks_does_not_stop_the_others() -> None:
    found = rows(right=Memory, late=WritesLate, forgets=Forgets, breaks=Breaks)
    assert {name: found[name].get("consistent") for name in ("right", "late", "forgets")} == {
        "right": "yes",
        "late": "no",
        "forgets": "no",
    }
    assert "no space left" in found["breaks"]["problem"]
    assert best_peer(found, "each_stall_s") == "right"
    for name in ("late", "forgets", "breaks"):
        value, note = compare(Comparison("metric", (name, "stall_s"), ("right", "stall_s")), found)
        assert math.isnan(value)
        assert note.startswith(name)
    assert all(len(found[RAW][f"each_{kind}_s"]) == 2 for kind in ("memcpy", "write", "read"))


@pytest.mark.ranks
@pytest.mark.slow
def test_ours_and_those_of_torch_keep_every_byte() -> None:
    found = rows(
        eager=ours.eager, lazy=ours.lazy, save=plain_files.TorchSave, sync=dcp.sync, thread=dcp.thread
    )
    for name, row in found.items():
        assert not row["problem"], f"{name}: {row['problem']}"
        assert row.get("consistent", "yes") == "yes", name
    assert found["lazy"]["recall_ms"] > 0


@pytest.mark.ranks
@pytest.mark.slow
def test_memory_is_measured_of_the_trainer_and_of_its_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.checkpoint.SAVES", 3)
    monkeypatch.setattr("benchmarks.checkpoint.WARM_UP_SAVES", 2)
    session = Session("test", False, 1, None, Console(file=io.StringIO()))
    (row,) = growth(ours.lazy, session)
    assert row["trainer_mib"] > 50
    assert row["keeper_mib"] > 5


def test_every_step_of_the_training_changes_every_tensor_and_restoring_is_noticed() -> None:
    training = Training(TINY)
    before = {name: tensor.clone() for name, tensor in training.tensors().items()}
    training.remember()
    assert training.is_as_remembered()
    training.optimizer.step()
    assert not training.is_as_remembered()
    after = training.tensors()
    assert len(after) == 6
    assert not any(torch.equal(before[name], after[name]) for name in before)
    for name, tensor in after.items():
        tensor.copy_(before[name])
    assert training.is_as_remembered()
    next(iter(after.values()))[3, 5] += 1e-3
    assert not training.is_as_remembered()


def row(name: str, *times: float, problem: str = "", consistent: str = "yes") -> Row:
    return {"contender": name, "each_stall_s": list(times), "problem": problem, "consistent": consistent}


def test_the_best_peer_is_the_fastest_that_is_right() -> None:
    found = {
        RAW: row(RAW, 0.1),
        LAZY: row(LAZY, 0.1, 0.2, 0.1),
        "wrong": row("wrong", 0.2, consistent="no"),
        "broken": row("broken", problem="it broke"),
        "slow": row("slow", 3.0, 4.0, 3.0),
        "fast": row("fast", 1.0, 2.0, 1.0),
    }
    assert best_peer(found, "each_stall_s") == "fast"
    value, note = compare(Comparison("metric", ("", "stall_s"), (LAZY, "stall_s")), found)
    assert value == pytest.approx(10.0)
    assert "fast" in note


def test_without_a_peer_there_is_no_number() -> None:
    value, note = compare(Comparison("metric", ("", "stall_s"), (LAZY, "stall_s")), {LAZY: row(LAZY, 1.0)})
    assert math.isnan(value)
    assert "no peer" in note


def test_all_metrics_are_there_and_the_state_is_large_enough() -> None:
    assert {comparison.metric for comparison in COMPARISONS} == {
        "stall_over_memcpy",
        "lazy_stall_over_memcpy",
        "durable_over_raw_write",
        "restore_over_raw_read",
        "pool_restore_over_memcpy",
        "lazy_stall_speedup_over_best_peer",
        "durable_speedup_over_dcp",
        "durable_speedup_over_best_peer",
        "restore_speedup_over_dcp",
    }
    assert jobs(quick=False)["large"].nbytes >= 256 * 2**20
    assert 3 * jobs(quick=False)["small"].num_params == 1500
    assert set(contenders(quick=True)) == {EAGER, LAZY}
