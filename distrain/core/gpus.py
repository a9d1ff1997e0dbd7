"""This node's NVIDIA GPUs by the driver's own tool, for processes that must not load torch or open a device."""

import shutil
import subprocess


def list_gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of each; empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode:
        return []
    rows = (line.rpartition(",") for line in answer.stdout.splitlines())
    return [(name.strip(), int(float(mebibytes)) * 1024**2) for name, _, mebibytes in rows]
