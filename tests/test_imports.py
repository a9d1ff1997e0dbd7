"""What imports cost: torch takes two seconds, and only what computes with tensors may load it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("launch", "checkpoint", "faults", "planners")
NEEDS_TORCH = {"distrain.core.device"}

IMPORT_ONE_BY_ONE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} loads torch")
"""

HELP = """
import sys
from distrain.cli import main
try:
    code = main(["--help"])
except SystemExit as end:
    code = end.code
sys.exit("torch is loaded" if "torch" in sys.modules else code)
"""


def run_python(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """A new interpreter at the root of the checkout, warnings as errors."""
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150, check=False
    )


def modules(folder: Path, package: str) -> list[str]:
    """Dotted names of all modules below ``folder``."""
    paths = (path.relative_to(folder).with_suffix("") for path in sorted(folder.rglob("*.py")))
    dotted = (".".join((package, *path.parts)).removesuffix(".__init__") for path in paths)
    return [name for name in dotted if not name.endswith("__main__")]


WITHOUT_TORCH = {
    "distrain": ["distrain"],
    "core": [name for name in modules(ROOT / "distrain/core", "distrain.core") if name not in NEEDS_TORCH],
    "planners": modules(ROOT / "planners", "distrain.planners"),
    "data": modules(ROOT / "distrain/train/data", "distrain.train.data"),
    "command line": modules(ROOT / "distrain/cli", "distrain.cli"),
    "rooms": [f"distrain.{room}" for room in ROOMS],
}


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_parts_that_do_not_compute_with_tensors_load_without_torch(part: str) -> None:
    assert WITHOUT_TORCH[part]
    done = run_python("-c", IMPORT_ONE_BY_ONE, *WITHOUT_TORCH[part])
    assert done.returncode == 0, done.stderr


def test_help_is_shown_without_torch() -> None:
    done = run_python("-c", HELP)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_the_test_for_torch_notices_it() -> None:
    done = run_python("-c", IMPORT_ONE_BY_ONE, "distrain.core.device")
    assert "distrain.core.device loads torch" in done.stderr


def test_every_module_can_be_imported_first() -> None:
    everything = modules(ROOT / "distrain", "distrain")
    everything += [name for room in ROOMS for name in modules(ROOT / room, f"distrain.{room}")]
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    for order in (everything, everything[::-1]):
        done = run_python("-c", code, *order)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_not_imported_past_the_package(room: str) -> None:
    done = run_python("-c", f"import {room}")
    assert done.returncode == 1
    assert f"ImportError: {room} is a part of distrain: import distrain.{room} instead" in done.stderr
