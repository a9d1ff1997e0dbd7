"""What this machine lets a fault injector do, found by trying it: privileges differ too much to be deduced."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from distrain.core import native, netns
from distrain.core.errors import MissingDependencyError

from .cgroups import find_controller
from .engines import clock

NETWORK, CLOCK = "network", "clock"
HINTS: Mapping[str, str] = MappingProxyType(
    {
        "cpu": "run as root, or in a container with a writable /sys/fs/cgroup",
        "freezer": "run as root, or in a container with a writable /sys/fs/cgroup; proc.sigstop needs neither",
        "memory": "run as root, or in a container with a writable /sys/fs/cgroup; proc.exit needs neither",
        NETWORK: netns.HINT,
        CLOCK: "install g++, which compiles what stands before libc in the processes of the job, and have "
        "DISTRAIN_CACHE_DIR name a folder without spaces and colons",
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


def probe(*, builds: bool = False) -> Capabilities:
    """Look at this machine; nothing of the attempt remains, but with ``builds`` native code in its cache."""
    tried = {name: _controller(name) for name in HINTS if name not in (NETWORK, CLOCK)}
    tried[NETWORK] = ("", missing) if (missing := netns.missing()) else ("a network namespace a node", "")
    tried[CLOCK] = _clock(builds=builds)
    return Capabilities(
        MappingProxyType({name: how for name, (how, _) in tried.items() if how}),
        MappingProxyType({name: reason for name, (_, reason) in tried.items() if reason}),
    )


def _controller(name: str) -> tuple[str, str]:
    """How it is done, or an empty text; and what is missing, if more can be said than that it is not there."""
    found = find_controller(name)
    return f"cgroup v{found.version} in {found.root}" if found else "", ""


def _clock(*, builds: bool) -> tuple[str, str]:
    how = "a library before libc"
    if not builds:
        return (how, "") if shutil.which(native.COMPILER) else ("", f"there is no {native.COMPILER}")
    try:
        clock.build()
    except MissingDependencyError as error:
        return "", "; ".join(f"{each.error}: {each.got}" for each in error.problems)
    return how, ""
