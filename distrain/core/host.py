"""Memory of this host and of this process, as the kernel counts it.

A container may be given less than the machine has; going by the machine's memory then ends in an OOM kill. Torch is
not needed for any of this, and the node's helper processes, which must start fast, need it too.
"""

import os
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory_bytes() -> int:
    """Memory that this host's processes can have: the physical memory or, if lower, the container's limit."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    limits = []
    for path in map(Path, _CGROUP_LIMITS):
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):  # another cgroup version, or the word "max"
            continue
    return limits


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Largest ``resident_bytes`` since the process started or ``reset_peak_resident`` was called."""
    return _status_bytes("VmHWM")


def reset_peak_resident() -> bool:
    """Start the peak anew; False where the kernel does not allow it, and the peak since the start remains."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
