"""Native builds: keyed by what they depend on, compiled once however many ask, never by a running job."""

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from distrain.core import native
from distrain.core.errors import MissingDependencyError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISTRAIN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def source(folder: Path, body: str = "return 42;", name: str = "answer.cpp") -> Path:
    path = folder / name
    path.write_text(f'extern "C" int answer() {{ {body} }}\n')
    return path


def answer(library: ctypes.CDLL) -> int:
    return int(library.answer())


SHIM = """#!/bin/sh
case "$*" in *--version*) ;; *) echo compile >> {log}; {before} ;; esac
exec {real} "$@"
"""


def shim(folder: Path, monkeypatch: pytest.MonkeyPatch, *, before: str = ":") -> Path:
    """Put a g++ first in the PATH that notes each compilation; returns the file of notes."""
    log, tools, real = folder / "compilations", folder / "tools", shutil.which("g++")
    log.touch()
    tools.mkdir()
    (tools / "g++").write_text(SHIM.format(log=log, before=before, real=real))
    (tools / "g++").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return log


def test_a_source_is_built_loaded_and_found_again_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source(tmp_path)
    assert answer(native.load("answer", [path], build=True)) == 42
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert answer(native.load("answer", [path], build=False)) == 42
    with pytest.raises(MissingDependencyError, match="needs a C"):
        native.load("answer", [path], build=True)


def test_a_running_job_never_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = shim(tmp_path, monkeypatch)
    with pytest.raises(MissingDependencyError, match="build it before the job"):
        native.load("answer", [source(tmp_path)], build=False)
    assert log.read_text() == ""


def test_a_second_build_takes_the_first_ones_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = shim(tmp_path, monkeypatch)
    for _ in range(3):
        native.load("answer", [source(tmp_path)], build=True)
    assert log.read_text().count("compile") == 1


def test_another_source_header_or_flag_is_another_library(tmp_path: Path) -> None:
    header, path = tmp_path / "value.hpp", tmp_path / "answer.cpp"
    header.write_text("#ifndef VALUE\n#define VALUE 1\n#endif\n")
    path.write_text('#include "value.hpp"\nextern "C" int answer() { return VALUE; }\n')
    assert answer(native.load("answer", [path, header], build=True)) == 1
    assert answer(native.load("answer", [path, header], build=True, flags=["-DVALUE=7"])) == 7
    header.write_text("#define VALUE 2\n")
    assert answer(native.load("answer", [path, header], build=True)) == 2
    path.write_text('#include "value.hpp"\nextern "C" int answer() { return VALUE + 10; }\n')
    assert answer(native.load("answer", [path, header], build=True)) == 12


def test_another_compiler_version_builds_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = source(tmp_path)
    native.load("answer", [path], build=True)
    log = shim(tmp_path, monkeypatch)
    tool = tmp_path / "tools" / "g++"
    tool.write_text(tool.read_text().replace("*--version*)", "*--version*) echo another;"))
    native.load("answer", [path], build=True)
    assert log.read_text().count("compile") == 1
    assert len(list(cache.rglob("*.so"))) == 2
    newest = max(cache.rglob("*.so"), key=lambda library: library.stat().st_mtime_ns)
    assert native.load("answer", [path], build=False)._name == str(newest)


def test_another_torch_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.load("answer", [source(tmp_path)], build=True)
    monkeypatch.setattr(native, "version", lambda name: "99.0")
    with pytest.raises(MissingDependencyError, match="not built"):
        native.load("answer", [source(tmp_path)], build=False)


def test_a_library_tuned_to_one_processor_is_not_loaded_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, path = ["-march=native"], source(tmp_path)
    for flags in (tuned, []):
        native.load("answer", [path], build=True, flags=flags)
    (tmp_path / "cpuinfo").write_text("flags : fpu another\n")
    monkeypatch.setattr(native, "CPU_INFO", tmp_path / "cpuinfo")
    assert answer(native.load("answer", [path], build=False)) == 42
    with pytest.raises(MissingDependencyError, match="not built"):
        native.load("answer", [path], build=False, flags=tuned)


def test_what_the_compiler_says_is_shown_and_nothing_is_left_behind(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(MissingDependencyError) as caught:
        native.load("answer", [source(tmp_path, "return no_such_name;")], build=True)
    assert "no_such_name" in str(caught.value)
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["lock"]


def test_a_library_that_everybody_can_write_is_not_loaded(tmp_path: Path, cache: Path) -> None:
    path = source(tmp_path)
    native.load("answer", [path], build=True)
    (library,) = cache.rglob("*.so")
    assert library.parent.stat().st_mode & 0o077 == 0
    library.chmod(0o777)
    for build in (True, False):
        with pytest.raises(MissingDependencyError, match="writable by everybody"):
            native.load("answer", [path], build=build)


BUILD = """
    import sys
    from pathlib import Path
    from distrain.core import native
    print(native.load("answer", [Path(sys.argv[1])], build=True).answer())
    assert "torch" not in sys.modules
"""


def builder(path: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(BUILD), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.processes
def test_of_many_processes_that_need_a_library_one_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = shim(tmp_path, monkeypatch)
    path = source(tmp_path)
    builders = [builder(path) for _ in range(6)]
    for process in builders:
        out, err = process.communicate(timeout=150)
        assert (process.returncode, out.strip()) == (0, "42"), err
    assert log.read_text().count("compile") == 1


@pytest.mark.processes
def test_a_killed_build_holds_nobody_up_and_leaves_no_half_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    started, go_on = tmp_path / "started", tmp_path / "go_on"
    os.mkfifo(started)
    shim(tmp_path, monkeypatch, before=f"echo > {started}; until [ -e {go_on} ]; do sleep 0.01; done")
    path = source(tmp_path)
    first = builder(path)
    started.read_text()  # the compiler is at work
    first.kill()
    first.communicate(timeout=150)
    second = builder(path)
    started.read_text()
    go_on.touch()  # the orphaned compiler of the first waited for this too
    out, err = second.communicate(timeout=150)
    assert (second.returncode, out.strip()) == (0, "42"), err
    assert len(list(cache.rglob("*.so"))) == 1
