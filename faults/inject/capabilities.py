"""What this machine lets a fault injector do, found by trying it: privileges differ too much to be deduced."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from distrain.core import netns

from .cgroups import find_controller

NETWORK = "network"
HINTS: Mapping[str, str] = MappingProxyType(
    {
        "cpu": "run as root, or in a container with a writable /sys/fs/cgroup",
        "freezer": "run as root, or in a container with a writable /sys/fs/cgroup; proc.sigstop needs neither",
        "memory": "run as root, or in a container with a writable /sys/fs/cgroup; proc.exit needs neither",
        NETWORK: netns.HINT,
    }
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """How each thing is done here, by name; what is missing has no entry."""

    found: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    reasons: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """what is missing exactly, where that is known"""

    def lacks(self, name: str) -> str:
        """What is missing for ``name``, or an empty text."""
        if name in self.found:
            return ""
        what = "network namespace" if name == NETWORK else f"control group with the {name} controller"
        return self.reasons.get(name, f"no {what} can be made by user {os.geteuid()}")


def probe() -> Capabilities:
    """Look at this machine; nothing of the attempt remains."""
    controllers = {name: find_controller(name) for name in HINTS if name != NETWORK}
    found = {name: f"cgroup v{each.version} in {each.root}" for name, each in controllers.items() if each}
    if what := netns.missing():
        return Capabilities(MappingProxyType(found), MappingProxyType({NETWORK: what}))
    return Capabilities(MappingProxyType(found | {NETWORK: "a network namespace a node"}))
