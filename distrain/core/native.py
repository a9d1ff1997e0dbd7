"""Building and loading native code: C++ sources become a shared library that is called through ctypes.

A library lies in a folder of the cache (``~/.cache/distrain``, or ``DISTRAIN_CACHE_DIR``) whose name hashes all that
it depends on: sources, flags, machine, torch and Python versions. In the folder there is one file for each compiler
version that built it. Builds happen under a lock of that folder and end in an atomic rename, so that of many ranks
that need a library one compiles and the others wait, and nobody ever loads half a file.

A running job never compiles: a thousand ranks compiling at start would be a storm, and compute nodes often have no
compiler. It takes what a build before the job has left there, or learns what is missing.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import MissingDependencyError

COMPILER = "g++"
FLAGS = ("-O3", "-std=c++17", "-Wall", "-shared", "-fPIC", "-pthread")
CPU_INFO = Path("/proc/cpuinfo")
_COMPILED = (".cpp", ".cc", ".cxx")


def load(name: str, sources: Sequence[Path], *, build: bool, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library ``name`` made of ``sources``; headers among them count for the hash and are not compiled.

    With ``build`` it is compiled where the cache lacks it; without, the compiler is not even looked for.

    Raises:
        MissingDependencyError: it is not built, there is no compiler, or the compiler refused the sources (the
            message holds what it said).
    """
    return ctypes.CDLL(str(find(name, sources, build=build, flags=flags)))


def find(name: str, sources: Sequence[Path], *, build: bool, flags: Sequence[str] = ()) -> Path:
    """Where the library is that ``load`` loads, for whoever has others load it; raises the same."""
    folder = _folder(name, sources, (*FLAGS, *flags))
    if build:
        return _built(folder, sources, flags)
    libraries = sorted(folder.glob("*.so"), key=lambda path: path.stat().st_mtime_ns)
    if not libraries:
        raise MissingDependencyError(
            f"the native library {name} is not built",
            got=f"no library in {folder}",
            hint="build it before the job: distrain.core.native.load(..., build=True)",
        )
    return _trusted(libraries[-1])


def cache_dir() -> Path:
    """Where built libraries are kept."""
    return Path(os.environ.get("DISTRAIN_CACHE_DIR") or Path.home() / ".cache" / "distrain")


def _folder(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    digest = hashlib.sha256()
    for part in (*flags, sys.version, platform.machine(), _torch_version(), _processor(flags)):
        digest.update(part.encode() + b"\0")
    for source in sources:
        content = source.read_bytes()
        digest.update(f"{source.name}\0{len(content)}\0".encode() + content)
    return cache_dir() / "native" / f"{name}-{digest.hexdigest()[:20]}"


def _torch_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""


def _processor(flags: Sequence[str]) -> str:
    """What the library is bound to if it is tuned to this processor, since caches are shared between nodes."""
    if not any(flag.startswith("-march=native") for flag in flags):
        return ""
    lines = CPU_INFO.read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _built(folder: Path, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """The library for the present compiler, compiled unless it is there."""
    compiler = _compiler_version()
    library = folder / f"{hashlib.sha256(compiler.encode()).hexdigest()[:12]}.so"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(folder / "lock"):
        for left_over in folder.glob("build-*"):  # of a build that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        if not library.exists():
            _compile(library, sources, flags)
    return _trusted(library)


def _compiler_version() -> str:
    try:
        done = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingDependencyError(
            "native code needs a C++ compiler", got=str(error), allowed=COMPILER, hint="install g++"
        ) from error
    return done.stdout


def _compile(library: Path, sources: Sequence[Path], flags: Sequence[str]) -> None:
    includes = dict.fromkeys(f"-I{source.parent}" for source in sources)
    inputs = [str(source) for source in sources if source.suffix in _COMPILED]
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
        output = Path(scratch) / library.name
        command = [COMPILER, *FLAGS, *includes, *inputs, "-o", str(output), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise MissingDependencyError(
                f"{COMPILER} refused the native sources", got=f"{' '.join(command)}\n{done.stderr.strip()}"
            )
        output.rename(library)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file, across threads and processes; the kernel lets go of it if its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _trusted(library: Path) -> Path:
    """Refuse a library that anybody could have put there: loading it is running it."""
    for path in (library, library.parent):
        if path.stat().st_mode & stat.S_IWOTH:
            raise MissingDependencyError(
                "a native library is writable by everybody and is not loaded",
                got=str(path),
                hint=f"chmod -R o-w {library.parent}",
            )
    return library
