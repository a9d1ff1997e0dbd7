"""What ranks that compute on the cores of one node find in their environment, unless it says otherwise already."""

from collections.abc import Mapping

THREADS = {"OMP_NUM_THREADS": "1"}
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""glibc would give the memory of a micro-batch back to the kernel and fault it in again for the next one, page by page:
5,000 faults a step, 5 % of the time, in a pipeline of small stages on CPUs"""


def for_ranks(environ: Mapping[str, str], *, nproc: int) -> Mapping[str, str]:
    """``environ`` with one compute thread a rank, if there are several, and a heap that is kept."""
    added = dict(HEAP) if not any(name in environ for name in HEAP) else {}
    return {**(THREADS if nproc > 1 else {}), **added, **environ}
