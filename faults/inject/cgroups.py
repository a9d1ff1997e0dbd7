"""Control groups: the kernel gives the processes of one less processor time or memory, or none at all.

Version 1 has one hierarchy a controller, version 2 a single one in which a group hands controllers down and keeps
processes at its leaves only. A ``Group`` hides which it is. It puts processes back where they came from; those of an
owner that was killed are found by name, and taken away by the next ``find_controller``. A group may also stand for an
emulated node (``launch``): its processes end with it.
"""

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

MOUNTS = Path("/sys/fs/cgroup")
FAULT, NODE = "distrain-fault", "distrain-node"
"""how names of groups begin: made for a fault, or to be an emulated node"""
PERIOD_S = 0.05
PATIENCE_S = 5.0
_KNOBS = {  # a file that a group of the controller has, in version 1 and 2
    "cpu": ("cpu.cfs_quota_us", "cpu.max"),
    "memory": ("memory.limit_in_bytes", "memory.max"),
    "freezer": ("freezer.state", "cgroup.freeze"),
}


@dataclass(frozen=True, slots=True)
class Controller:
    """A folder of cgroups below which this process can make groups."""

    name: str
    mount: Path
    root: Path
    version: int


def find_controller(name: str, *, mounts: Path = MOUNTS) -> Controller | None:
    """The controller ``cpu``, ``memory`` or ``freezer``, if this process may use it."""
    for controller in _candidates(name, mounts):
        try:
            probe = Group(controller)
        except OSError:
            continue
        is_usable = (probe.path / _KNOBS[name][controller.version - 1]).exists()
        probe.close()
        if is_usable:
            _sweep(controller)
            return controller
    return None


def sweep() -> None:
    """Take away the groups of owners that are dead, and let go of what is frozen there."""
    for name in _KNOBS:
        find_controller(name)


def _candidates(name: str, mounts: Path) -> Iterator[Controller]:
    """The group of this process and those above it, nearest first."""
    for version, mount in ((1, mounts / name), (2, mounts), (2, mounts / "unified")):
        home = _home(os.getpid(), name, version, mount)
        if home is None:
            continue
        for folder in (home, *home.parents):
            if not folder.is_relative_to(mount):
                break
            if version == 2 and name != "freezer":  # every group of version 2 can freeze
                with contextlib.suppress(OSError):
                    (folder / "cgroup.subtree_control").write_text(f"+{name}")
            yield Controller(name, mount, folder, version)


def _home(pid: int, name: str, version: int, mount: Path) -> Path | None:
    """The group that a process is in; in a container its path may be the host's, and the mount stands for it."""
    if not (mount / "cgroup.procs").exists():
        return None
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if (name in controllers.split(",")) if version == 1 else not controllers:
            home = mount / path.strip("/")
            return home if home.exists() else mount
    return None


def _sweep(controller: Controller) -> None:
    for path in (*controller.root.glob(f"{FAULT}-*"), *controller.root.glob(f"{NODE}-*")):
        owner = path.name.split("-")[2]
        if _is_gone(owner):
            with contextlib.suppress(OSError):
                group = Group(controller, path=path)
                if path.name.startswith(NODE):
                    group.kill()
                group.close()


def _is_gone(pid: str) -> bool:
    """Whether a process is no more, or only waits to be collected."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def fellows(pid: int) -> list[int]:
    """All processes of the emulated node that a process belongs to; none if its node has no group."""
    controller = find_controller("freezer")
    try:
        home = _home(pid, "freezer", controller.version, controller.mount) if controller else None
        return _members(home) if home and home.name.startswith(NODE) else []
    except OSError:  # the process or its whole node has just ended
        return []


def _members(group: Path) -> list[int]:
    """The processes in a group that have a number here; the kernel lists those of other pid namespaces as 0."""
    return [int(word) for word in (group / "cgroup.procs").read_text().split() if word != "0"]


class Group:
    """A group of processes. All methods raise OSError."""

    def __init__(self, controller: Controller, *, prefix: str = FAULT, path: Path | None = None) -> None:
        """Make a group, or take over the one at ``path``."""
        self._controller = controller
        self._homes: dict[int, Path] = {}
        self.path = path or controller.root / f"{prefix}-{os.getpid()}-{secrets.token_hex(4)}"
        if path is None:
            self.path.mkdir()

    def join(self, pid: int) -> None:
        """Put a process with all its threads, and what it will start, into the group."""
        controller = self._controller
        home = _home(pid, controller.name, controller.version, controller.mount)
        self._homes[pid] = home or controller.mount
        self._write("cgroup.procs", str(pid))

    def limit_cpu(self, quota: float) -> None:
        """Give no more than ``quota`` of a core, all processes together."""
        period, budget = round(PERIOD_S * 1e6), max(1000, round(PERIOD_S * 1e6 * quota))
        if self._controller.version == 1:
            self._write("cpu.cfs_period_us", str(period))
            self._write("cpu.cfs_quota_us", str(budget))
        else:
            self._write("cpu.max", f"{budget} {period}")

    def limit_memory(self, nbytes: int) -> None:
        """Kill what asks for more; memory that a process brings along is not counted."""
        if self._controller.version == 1:
            self._write("memory.limit_in_bytes", str(nbytes))
        else:
            self._write("memory.max", str(nbytes))
            with contextlib.suppress(OSError):  # a kernel without swap accounting
                self._write("memory.swap.max", "0")

    def freeze(self) -> None:
        """Stop all processes, in the middle of whatever they do; returns when they stand still."""
        if self._controller.version == 1:
            self._write("freezer.state", "FROZEN")
            self._until(lambda: (self.path / "freezer.state").read_text().strip() == "FROZEN")
        else:
            self._write("cgroup.freeze", "1")
            self._until(lambda: "frozen 1" in (self.path / "cgroup.events").read_text())

    def thaw(self) -> None:
        """Let them go on."""
        if self._controller.version == 1:
            self._write("freezer.state", "THAWED")
        else:
            self._write("cgroup.freeze", "0")

    def kill(self) -> None:
        """End all processes, those included that are born meanwhile."""
        if self._controller.name == "freezer":
            with contextlib.suppress(OSError):  # the kernel cannot: nothing was frozen then
                self.thaw()
        self._until(lambda: not self._killed())

    def close(self) -> None:
        """Let all processes go on where they came from, and delete the group."""
        if self._controller.name == "freezer":
            with contextlib.suppress(OSError):  # the kernel cannot: nothing was frozen then
                self.thaw()
        for pid in self.pids():
            with contextlib.suppress(OSError):  # it has just ended
                home = self._homes.get(pid, self._controller.root)
                (home / "cgroup.procs").write_text(str(pid))
        self._until(self._is_removed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def pids(self) -> list[int]:
        """The processes in the group."""
        return _members(self.path)

    def _killed(self) -> list[int]:
        pids = self.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def _write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)

    def _is_removed(self) -> bool:
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:  # busy until the kernel has buried the last dead
            return False
        return True

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.path}: the kernel does not do what it was asked to")
            time.sleep(0.002)
