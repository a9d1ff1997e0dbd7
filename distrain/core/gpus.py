"""This node's NVIDIA GPUs by the driver's own tool, for processes that must not load torch or open a device."""

import shutil
import subprocess

PATIENCE_S = 30.0
"""a driver that is being loaded takes its time; one that hangs is not waited for"""


def list_gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of each; empty without a driver.

    Raises:
        OSError: the driver's tool fails; says what it said.
        subprocess.TimeoutExpired: it does not answer.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    if answer.returncode:
        said = (answer.stderr.strip() or answer.stdout.strip())[-500:]
        raise OSError(f"{tool} ended with {answer.returncode}: {said}")
    rows = (line.rpartition(",") for line in answer.stdout.splitlines())
    return [(name.strip(), int(float(mebibytes)) * 1024**2) for name, _, mebibytes in rows]
