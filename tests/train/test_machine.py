"""The machine that a run is planned for, where it cannot be asked."""

import subprocess

import pytest

from distrain.core.config import RunConfig
from distrain.train import machine
from distrain.train.machine import Machine


@pytest.mark.parametrize(
    "error", [OSError("the driver is gone"), subprocess.TimeoutExpired("nvidia-smi", 30)]
)
def test_a_driver_that_fails_or_hangs_is_as_good_as_none(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[tuple[str, int]]:
        raise error

    monkeypatch.setattr(machine, "list_gpus", broken)
    assert Machine.of(RunConfig(), world_size=1, here=True).cluster.device.name == "cpu"
