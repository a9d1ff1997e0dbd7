"""FlexSP's bucketing (arXiv 2412.01523, section 4.3): sequences of similar length share a variable of the program.

All members of a bucket count as long as its longest, so the program over-estimates. Dynamic programming finds the
buckets with the least over-estimate: with lengths ascending, a bucket of the lengths i..j costs
``length_j (j - i + 1) - sum`` and the best partition into b buckets extends one into b - 1.
"""

from collections.abc import Sequence

import numpy as np

NUM_BUCKETS = 16


def buckets(lengths: Sequence[float], num_buckets: int = NUM_BUCKETS) -> list[list[int]]:
    """Indices of ``lengths`` in at most ``num_buckets`` buckets of least total over-estimate, shortest first."""
    order = np.argsort(lengths, kind="stable")
    ascending = np.asarray(lengths, dtype=np.float64)[order]
    num = len(ascending)
    if num_buckets >= num:
        return [[int(each)] for each in order]
    sums = np.concatenate([[0.0], np.cumsum(ascending)])
    # waste[i, j]: of a bucket that holds lengths i..j-1
    ends = np.arange(1, num + 1)
    best = ascending[ends - 1] * ends - sums[ends]
    best = np.concatenate([[0.0], best])
    choices = []
    for _ in range(1, num_buckets):
        starts = np.zeros(num + 1, dtype=np.int64)
        following = best.copy()
        for end in range(1, num + 1):
            begins = np.arange(end)
            waste = best[:end] + ascending[end - 1] * (end - begins) - (sums[end] - sums[:end])
            starts[end] = int(np.argmin(waste))
            following[end] = waste[starts[end]]
        choices.append(starts)
        best = following
    found = []
    end = num
    for starts in reversed(choices):
        if end > 0:
            found.append((int(starts[end]), end))
            end = int(starts[end])
    if end > 0:
        found.append((0, end))
    return [[int(each) for each in order[begin:stop]] for begin, stop in reversed(found)]


def enough_buckets(lengths: Sequence[float], memory: float) -> list[list[int]]:
    """As few buckets, from 16 on, as keep the over-estimate within half of what ``memory`` (tokens) leaves free."""
    for num in range(NUM_BUCKETS, len(lengths)):
        found = buckets(lengths, num)
        counted = sum(max(lengths[each] for each in bucket) * len(bucket) for bucket in found)
        if counted <= (sum(lengths) + memory) / 2:
            return found
    return [[each] for each in range(len(lengths))]
