"""What this node can do: its installation, processors, memory, GPUs, network, disk, and what it lets us break.

Each area is asked in its own way, and one that cannot be asked says so in place of its answers: a doctor must not die
of what it finds. Nothing here imports torch, so that it also answers where torch is what is broken.
"""

import os
import platform
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

from distrain.core.gpus import list_gpus
from distrain.core.host import host_memory_bytes
from distrain.core.vocabulary import GIB
from distrain.faults.inject.capabilities import HINTS, probe

REQUIRED = ("torch", "numpy", "typer", "rich", "zarr", "google-crc32c", "pulp", "highspy")
EXTRAS: Mapping[str, str] = MappingProxyType(
    {
        "pyeclib": "checksums at the speed of memory: pip install 'distrain[checkpoint]'",
        "deepspeed": "convert and compare with DeepSpeed: pip install 'distrain[deepspeed]'",
        "mpi4py": "start under mpiexec: pip install 'distrain[mpi]'",
        "matplotlib": "plots: pip install 'distrain[plot]'",
    }
)
_ENOUGH_FILES = 65536


class Health(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    LIMITED = "limited"
    """works, and something is slower or not offered"""
    BROKEN = "broken"
    """nothing can be trained so"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    area: str
    name: str
    value: str
    health: Health = Health.OK
    hint: str = ""
    """what it would give, or how to mend it"""


def examine(folder: Path) -> list[Finding]:
    """Look at everything; ``folder`` is where runs will write."""
    areas: dict[str, Callable[[], Iterator[Finding]]] = {
        "installation": _installation,
        "node": _node,
        "gpu": _gpus,
        "network": _network,
        "disk": lambda: _disk(folder),
        "faults": _faults,
    }
    findings = []
    for area, look in areas.items():
        try:
            findings += list(look())
        except Exception as error:  # what is broken here is what the doctor was called for
            findings.append(Finding(area, "not known", f"{type(error).__name__}: {error}", Health.LIMITED))
    return findings


def _installation() -> Iterator[Finding]:
    area = "installation"
    yield Finding(area, "python", platform.python_version())
    for package in ("distrain", *REQUIRED):
        found = _version(package)
        health = Health.OK if found else Health.BROKEN
        yield Finding(area, package, found or "missing", health, "" if found else f"pip install {package}")
    for package, gives in EXTRAS.items():
        found = _version(package)
        yield Finding(
            area, package, found or "missing", Health.OK if found else Health.LIMITED, "" if found else gives
        )
    compiler = shutil.which("g++")
    hint = "" if compiler else "planners and checksums run in Python, many times slower: install g++"
    yield Finding(area, "g++", compiler or "missing", Health.OK if compiler else Health.LIMITED, hint)


def _node() -> Iterator[Finding]:
    area = "node"
    yield Finding(area, "kernel", platform.release())
    yield Finding(area, "cores", str(len(os.sched_getaffinity(0))))
    yield Finding(area, "memory", f"{host_memory_bytes() / GIB:.1f} GiB")
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    hint = "" if shared >= GIB else "ranks on one node talk through it: docker run --shm-size=8g"
    yield Finding(area, "/dev/shm", f"{shared / GIB:.1f} GiB", Health.LIMITED if hint else Health.OK, hint)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    few = 0 <= files < _ENOUGH_FILES
    hint = f"large jobs hold a connection for each pair: ulimit -Hn {_ENOUGH_FILES}" if few else ""
    yield Finding(area, "open files", _limit(files), Health.LIMITED if few else Health.OK, hint)
    yield Finding(area, "locked memory", _limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]))


def _gpus() -> Iterator[Finding]:
    gpus = list_gpus()
    for index, (name, memory_bytes) in enumerate(gpus):
        yield Finding("gpu", str(index), f"{name}, {memory_bytes / GIB:.0f} GiB")
    if not gpus:
        yield Finding("gpu", "count", "0", Health.LIMITED, "ranks compute on the processor, with gloo")


def _network() -> Iterator[Finding]:
    for _, name in socket.if_nameindex():
        state = _read(Path("/sys/class/net") / name / "operstate") or "unknown"
        speed = _read(Path("/sys/class/net") / name / "speed")
        rate = f", {int(speed) / 1000:g} Gb/s" if speed.isdecimal() else ""
        yield Finding("network", name, state + rate)
    for device in sorted(Path("/sys/class/infiniband").glob("*")):
        yield Finding("network", device.name, f"RDMA, {_read(device / 'ports/1/rate') or 'rate not known'}")


def _disk(folder: Path) -> Iterator[Finding]:
    at = folder.resolve()
    while not at.exists():
        at = at.parent
    usage = shutil.disk_usage(at)
    yield Finding("disk", str(at), f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free")
    if not os.access(at, os.W_OK):
        yield Finding("disk", "writable", "no", Health.BROKEN, "choose another run_dir")
        return
    direct = _writes_directly(at)
    hint = "" if direct else "checkpoints go through the page cache, which costs memory and time"
    yield Finding(
        "disk", "O_DIRECT", "yes" if direct else "no", Health.OK if direct else Health.LIMITED, hint
    )


def _faults() -> Iterator[Finding]:
    capabilities = probe()
    for name, hint in HINTS.items():
        lacking = capabilities.lacks(name)
        health = Health.LIMITED if lacking else Health.OK
        yield Finding("faults", name, lacking or capabilities.found[name], health, hint if lacking else "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _limit(value: int) -> str:
    return "no limit" if value == resource.RLIM_INFINITY else f"{value:,}"


def _read(path: Path) -> str:
    """A line of the kernel's; some interfaces answer with an error where they have nothing to say."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _writes_directly(folder: Path) -> bool:
    descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        os.close(descriptor)
        os.close(os.open(name, os.O_WRONLY | os.O_DIRECT))
        return True
    except OSError:
        return False
    finally:
        os.unlink(name)
