"""The wheel: all of the package under one name, and complete without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("launch", "checkpoint", "faults", "planners")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")

pytestmark = [pytest.mark.slow, pytest.mark.processes]


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command that must succeed, in an environment that does not point to the checkout."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for folder in ("distrain", *ROOMS):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel, which borrows its dependencies from ours."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    arguments = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, *arguments, wheel, cwd=home)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_brings_one_name_and_every_module(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"distrain"}
    sources = {
        f"distrain/{path.relative_to(ROOT / 'distrain')}" for path in (ROOT / "distrain").rglob("*.py")
    }
    for room in ROOMS:
        sources |= {f"distrain/{path.relative_to(ROOT)}" for path in (ROOT / room).rglob("*.py")}
    assert sources <= names
    assert "distrain/py.typed" in names
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_command_works_away_from_the_checkout(python: Path, tmp_path: Path) -> None:
    assert "train" in run(python.parent / "distrain", "--help", cwd=tmp_path)
    assert "train" in run(python, "-m", "distrain", "--help", cwd=tmp_path)


def test_rooms_come_from_the_wheel_and_mean_the_same_in_a_spawned_process(
    python: Path, tmp_path: Path
) -> None:
    script = """
        import importlib, multiprocessing
        from distrain.core.vocabulary import Degrees

        def child(connection):
            rooms = [importlib.import_module(f"distrain.{room}") for room in ("launch", "faults", "planners")]
            connection.send([room.__file__ for room in rooms])
            connection.send(Degrees(tp=2))

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            process = context.Process(target=child, args=(there,))
            process.start()
            print(*here.recv(), sep="\\n")
            assert type(here.recv()) is Degrees
            process.join()
        """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    files = run(python, "script.py", cwd=tmp_path).splitlines()
    assert [Path(file).is_relative_to(python.parent.parent) for file in files] == [True] * 3


def test_rooms_are_no_top_level_packages_of_the_wheel(python: Path, tmp_path: Path) -> None:
    code = "import importlib.util as u, sys; print([name for name in sys.argv[1:] if u.find_spec(name)])"
    assert run(python, "-c", code, *ROOMS, cwd=tmp_path).strip() == "[]"
