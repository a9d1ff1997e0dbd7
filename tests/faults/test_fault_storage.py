"""Storage that fails as the plan says: what lies on the disk, and what the writer was told."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from distrain.checkpoint.candidates import candidates
from distrain.checkpoint.errors import StorageError
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.core.failpoints import FAILPOINTS
from distrain.faults.inject import FaultPlan, Injector, Record, arm, read_truth
from helpers.checkpoints import whole, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DATA: NDArray[np.int64] = np.arange(1 << 17)


@contextmanager
def armed(plan: FaultPlan, folder: Path) -> Iterator[None]:
    """This process, as a keeper."""
    injector = Injector(plan, folder / "truth")
    with injector, arm(role="keeper", environ=injector.variables):
        yield
    assert FAILPOINTS.names() == []


def records(folder: Path) -> list[Record]:
    return read_truth(folder / "truth")


def write(root: Path, step: int) -> Path:
    return write_checkpoint(root, [[whole("w", "int64", DATA)]], step=step)


def blob(checkpoint: Path) -> bytes:
    return (checkpoint / "data/0/0").read_bytes()


@pytest.mark.parametrize(("kind", "number"), [("ckpt.enospc", errno.ENOSPC), ("ckpt.eio", errno.EIO)])
@pytest.mark.parametrize("operation", ["pwrite", "fsync", "write", "rename"])
def test_an_error_costs_the_checkpoint_of_its_step_and_no_other(
    tmp_path: Path, kind: str, number: int, operation: str
) -> None:
    plan = FaultPlan().inject(kind, operation=operation).at(step=2)
    with armed(plan, tmp_path):
        write(tmp_path / "run", 1)
        with pytest.raises(StorageError) as caught:
            write(tmp_path / "run", 2)
        write(tmp_path / "run", 3)
    assert errno.errorcode[number] in str(caught.value)
    steps = {each.step for each in candidates(PosixStorage(tmp_path / "run"), writers=[0]) if each.manifest}
    assert steps == {1, 3}
    (record,) = records(tmp_path)
    assert (record.kind, record.step, record.victim) == (kind, 2, 0)
    assert "step-00000002" in record.detail["path"]


def test_an_error_comes_as_often_as_it_says(tmp_path: Path) -> None:
    with armed(FaultPlan().inject("ckpt.eio", operation="fsync", times=2), tmp_path):
        for step in (1, 2):
            with pytest.raises(StorageError):
                write(tmp_path / "run", step)
        write(tmp_path / "run", 3)


def test_a_full_disk_is_full_until_its_time_is_over(tmp_path: Path) -> None:
    with armed(FaultPlan().inject("ckpt.enospc", times=0).lasting(0.5), tmp_path):
        start, num_failed = time.monotonic(), 0
        while True:
            try:
                write(tmp_path / "run", 1)
                break
            except StorageError:
                num_failed += 1
    assert time.monotonic() - start >= 0.5
    assert num_failed > 1


def test_a_broken_disk_cannot_be_read(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "run", 4)
    source = f"{checkpoint.name}/data/0/0"
    with armed(FaultPlan().inject("ckpt.eio", operation="read").at(step=4), tmp_path):
        with PosixStorage(tmp_path / "run").source(source) as file, pytest.raises(StorageError, match="EIO"):
            file.read(0, memoryview(bytearray(8)))
        with PosixStorage(tmp_path / "run").source(source) as file:
            file.read(0, memoryview(bytearray(8)))


def test_a_slow_disk_takes_its_time_for_every_write(tmp_path: Path) -> None:
    plan = FaultPlan().inject("ckpt.slow", operation="fsync", delay_s=0.2, times=2).at(step=2)
    took = {}
    with armed(plan, tmp_path):
        for step in range(1, 5):
            start = time.monotonic()
            write(tmp_path / "run", step)
            took[step] = time.monotonic() - start
    assert min(took[2], took[3]) >= 0.2
    assert [record.step for record in records(tmp_path)] == [2]


def test_a_corrupted_block_differs_in_one_bit_and_is_found(tmp_path: Path) -> None:
    sound = blob(write(tmp_path / "sound", 2))
    with armed(FaultPlan(seed=5).inject("ckpt.corrupt").at(step=2), tmp_path):
        checkpoint = write(tmp_path / "run", 2)
    (record,) = records(tmp_path)
    found = blob(checkpoint)
    differing = [n for n in range(0, len(found), 4096) if found[n : n + 4096] != sound[n : n + 4096]]
    assert differing == [record.detail["byte"] // 4096 * 4096]
    byte = record.detail["byte"]
    assert found[byte] ^ sound[byte] == 1 << record.detail["bit"]
    with pytest.raises(ValueError, match="damaged"):
        read_back(checkpoint)


def test_a_torn_write_has_only_its_first_half_and_is_found(tmp_path: Path) -> None:
    sound = blob(write(tmp_path / "sound", 2))
    with armed(FaultPlan().inject("ckpt.torn", crash=False).at(step=2), tmp_path):
        checkpoint = write(tmp_path / "run", 2)
    assert blob(checkpoint) == torn(sound, records(tmp_path)[0])
    with pytest.raises(ValueError, match="damaged"):
        read_back(checkpoint)


def torn(sound: bytes, record: Record) -> bytes:
    """What is left of a blob, of which something is lost."""
    start, stop = record.detail["zeros_from"], record.detail["zeros_to"]
    assert any(sound[start:stop])
    return sound[:start] + bytes(stop - start) + sound[stop:]


def read_back(checkpoint: Path) -> None:
    """Verify all of a checkpoint, as `distrain ckpt verify` does."""
    done = subprocess.run(
        [sys.executable, "-m", "distrain", "ckpt", "verify", str(checkpoint)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(done.stdout + done.stderr)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from distrain.faults.inject import arm
from helpers.checkpoints import whole, write_checkpoint

with arm(role="keeper"):
    for step in range(1, 4):
        write_checkpoint(Path(sys.argv[1]), [[whole("w", "int64", np.arange(1 << 17))]], step=step)
"""


@pytest.mark.processes
def test_a_torn_write_takes_its_writer_with_it_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    injector = Injector(FaultPlan().inject("ckpt.torn").at(step=2), tmp_path / "truth")
    with injector:
        environ: Mapping[str, str] = {
            **os.environ,
            **injector.variables,
            "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
        }
        done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path / "run")], env=environ)
    assert done.returncode == -signal.SIGKILL
    good = [each.step for each in candidates(PosixStorage(tmp_path / "run"), writers=[0]) if each.manifest]
    assert good == [1]
    (record,) = records(tmp_path)
    assert record.detail["crash"] is True
    sound = blob(write(tmp_path / "sound", 2))
    found = Path(record.detail["path"]).read_bytes()
    assert found[: len(sound)] == torn(sound, record)[: len(found)]
