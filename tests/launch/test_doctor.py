"""``launch.doctor``: what is there is found, what is missing is named with what it would give, and nothing stops it."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from distrain.core import gpus
from distrain.launch import doctor
from distrain.launch.doctor import Health, examine


def found(folder: Path, name: str) -> doctor.Finding:
    (finding,) = [each for each in examine(folder) if each.name == name]
    return finding


def test_the_installation_and_the_node_are_described_with_their_figures(tmp_path: Path) -> None:
    assert found(tmp_path, "torch").health is Health.OK
    assert found(tmp_path, "cores").value == str(len(os.sched_getaffinity(0)))
    assert "GiB free" in found(tmp_path, str(tmp_path)).value


def test_a_missing_package_that_training_needs_is_broken_and_an_extra_is_only_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package",))
    monkeypatch.setattr(doctor, "EXTRAS", {"no-such-extra": "what it gives"})
    assert found(tmp_path, "no-such-package").health is Health.BROKEN
    assert found(tmp_path, "no-such-extra").health is Health.LIMITED
    assert found(tmp_path, "no-such-extra").hint == "what it gives"


def test_all_that_an_installation_brings_along_is_looked_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[\[<>=]", each)[0] for each in project["dependencies"]}
    solver = {"highspy"}  # pulp's extra
    assert set(doctor.REQUIRED) == names | solver


def test_without_a_compiler_it_says_what_that_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(tmp_path, "g++").health is Health.LIMITED


def test_gpus_are_listed_by_the_drivers_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gpus = [each for each in examine(tmp_path) if each.area == "gpu"]
    assert [gpu.value for gpu in gpus] == ["NVIDIA H100 80GB HBM3, 80 GiB"] * 2


def test_a_driver_that_fails_is_not_taken_for_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'could not talk to the driver'\nexit 9\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (gpu,) = [each for each in examine(tmp_path) if each.area == "gpu"]
    assert (gpu.name, gpu.health) == ("not known", Health.LIMITED)
    assert "could not talk to the driver" in gpu.value


def test_a_driver_that_hangs_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 20\n")
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "PATIENCE_S", 0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        gpus.list_gpus()


def test_an_area_that_cannot_be_asked_says_so_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[tuple[str, int]]:
        raise OSError("the driver is gone")

    monkeypatch.setattr(doctor, "list_gpus", broken)
    (gpu,) = [each for each in examine(tmp_path) if each.area == "gpu"]
    assert gpu.health is Health.LIMITED
    assert "the driver is gone" in gpu.value
    assert found(tmp_path, "torch").health is Health.OK


def test_a_folder_that_does_not_exist_yet_is_judged_by_the_one_it_will_be_made_in(tmp_path: Path) -> None:
    assert "GiB free" in found(tmp_path / "runs" / "new", str(tmp_path)).value


def test_the_look_leaves_nothing_behind(tmp_path: Path) -> None:
    examine(tmp_path)
    assert list(tmp_path.iterdir()) == []
