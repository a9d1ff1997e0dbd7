"""What this machine lets a fault injector do, found by trying it: privileges differ too much to be deduced."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from .cgroups import find_controller

HINTS: Mapping[str, str] = MappingProxyType(
    {
        "cpu": "run as root, or in a container with a writable /sys/fs/cgroup",
        "freezer": "run as root, or in a container with a writable /sys/fs/cgroup; proc.sigstop needs neither",
        "memory": "run as root, or in a container with a writable /sys/fs/cgroup; proc.exit needs neither",
    }
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """How each thing is done here, by name; what is missing has no entry."""

    found: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def lacks(self, name: str) -> str:
        """What is missing for ``name``, or an empty text."""
        if name in self.found:
            return ""
        return f"no control group with the {name} controller can be made by user {os.geteuid()}"


def probe() -> Capabilities:
    """Look at this machine; nothing of the attempt remains."""
    controllers = {name: find_controller(name) for name in HINTS}
    found = {name: f"cgroup v{each.version} in {each.root}" for name, each in controllers.items() if each}
    return Capabilities(MappingProxyType(found))
