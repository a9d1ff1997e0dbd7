"""How many accelerators this node has, by torch's own count: in a process of its own, so that the launcher stays small
and never opens a device."""

import os
import subprocess
import sys

from distrain.core.errors import LaunchError

_COUNT = {
    "gpu": "torch.cuda.device_count()",
    "xpu": "torch.xpu.device_count()",
    "auto": "torch.accelerator.device_count() if torch.accelerator.is_available() else -1",
}


def count_devices(kind: str) -> int:
    """Devices of ``kind``: gpu, xpu, cpu, or auto for accelerators, else cpu cores that this process may use."""
    if kind != "cpu":
        code = f"import torch; print({_COUNT[kind]})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise LaunchError("torch could not count this node's devices", got=last)
        count = int(done.stdout.split()[-1])
        if count >= 0:
            return count
    return len(os.sched_getaffinity(0))
