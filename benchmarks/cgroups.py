"""Control groups with a CPU quota: the kernel gives a group no more than its share of each period.

Version 1 has a hierarchy of its own for the cpu controller; in version 2 a group must hand the controller down, and
keeps processes at its leaves only.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = "distrain-speed"
MOUNTS = Path("/sys/fs/cgroup")
WEIGHT = 50  # times the weight of other groups: a device should not slow down because somebody else compiles


@dataclass(frozen=True, slots=True)
class Controller:
    """A folder of cgroups below which groups with a CPU quota can be made."""

    root: Path
    home: Path
    """the group that this process is in, to which others return"""
    version: int

    def create(self, name: str, *, quota: float, period_s: float) -> Path:
        """A new group limited to ``quota`` cores. OSError if that is not possible."""
        group = self.root / name
        group.mkdir()
        period, budget = int(period_s * 1e6), int(period_s * 1e6 * quota)
        try:
            if self.version == 1:
                (group / "cpu.cfs_period_us").write_text(str(period))
                (group / "cpu.cfs_quota_us").write_text(str(budget))
                (group / "cpu.shares").write_text(str(1024 * WEIGHT))
            else:
                (group / "cpu.max").write_text(f"{budget} {period}")
                (group / "cpu.weight").write_text(str(100 * WEIGHT))
        except OSError:
            group.rmdir()
            raise
        return group

    def remove(self, group: Path) -> None:
        """Move what still runs in ``group`` out of it and delete it."""
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # it has just ended
                (self.home / "cgroup.procs").write_text(pid)
        deadline = time.monotonic() + 2.0
        while True:
            try:
                return group.rmdir()
            except OSError:  # busy until the kernel has buried the last dead
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def find_controller(mounts: Path = MOUNTS) -> Controller | None:
    """The CPU controller that this process may use, if any; what earlier owners left behind there is removed."""
    for controller in _candidates(mounts):
        try:
            probe = controller.create(f"{PREFIX}-{os.getpid()}-probe", quota=0.5, period_s=0.01)
        except OSError:
            continue
        controller.remove(probe)
        _sweep(controller)
        return controller
    return None


def _candidates(mounts: Path) -> Iterator[Controller]:
    """The group of this process and its ancestors, nearest first, version 1 before version 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        is_v2 = not controllers
        if not is_v2 and "cpu" not in controllers.split(","):
            continue
        mount = mounts if is_v2 else mounts / controllers
        own = mount / path.strip("/")
        home = own if own.exists() else mount  # in a container the path may be the host's
        for folder in (home, *home.parents):
            if not folder.is_relative_to(mount):
                break
            if is_v2:
                with contextlib.suppress(OSError):
                    (folder / "cgroup.subtree_control").write_text("+cpu")
            yield Controller(folder, home, 2 if is_v2 else 1)


def _sweep(controller: Controller) -> None:
    """Delete groups whose owner is gone: nobody cleans up after a SIGKILL but the next one."""
    for group in controller.root.glob(f"{PREFIX}-*"):
        owner = group.name.removeprefix(f"{PREFIX}-").split("-")[0]
        if not Path("/proc", owner).exists():
            with contextlib.suppress(OSError):
                controller.remove(group)


class Cgroups:
    """One group a device; a ``FixedSpeed``."""

    def __init__(self, controller: Controller, num_devices: int, *, quota: float, period_s: float) -> None:
        self.kind = f"cgroup v{controller.version}"
        self.quota = quota
        self._period_s = period_s
        self._controller = controller
        self._num_devices = num_devices
        self._groups: list[Path] = []

    def __enter__(self) -> "Cgroups":
        try:
            for device in range(self._num_devices):
                name = f"{PREFIX}-{os.getpid()}-{id(self):x}-{device}"
                self._groups.append(self._controller.create(name, quota=self.quota, period_s=self._period_s))
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._groups:
            self._controller.remove(self._groups.pop())

    def join(self, device: int, pid: int) -> None:
        """Put the process ``pid``, with its threads and future children, on ``device``."""
        (self._groups[device] / "cgroup.procs").write_text(str(pid))
