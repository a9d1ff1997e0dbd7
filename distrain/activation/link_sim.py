"""A step on three streams and a slow link, simulated event by event: what a policy really costs.

The policy's program (``planners.activation_policy``) reckons with one bandwidth for each direction. Real links start
late and slow down when both directions are busy, since both end in the same host memory. Here streams work through
queues, each piece of work waits for those it needs, and copies in progress share the link anew whenever one begins or
ends::

    compute   F0 F1 F2 ...      Bn  R B  R B
    out          c0 c1 ...
    in                        c1  c0               half speed each, while both are busy
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from distrain.planners.activation_policy import ActivationTask, Policy
from distrain.planners.activation_policy.replay import group_bytes, recompute_s


class Stream(IntEnum):
    """A queue of work in order."""

    COMPUTE = 0
    OUT = 1
    IN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Between a device and its host."""

    out_bytes_s: float
    in_bytes_s: float
    both_bytes_s: float = math.inf
    """of both directions together"""
    latency_s: float = 0.0
    """before the first byte of each copy"""

    def rates(self, *, out: bool, into: bool) -> tuple[float, float]:
        """Bytes/s of each direction, if these are busy."""
        wanted = (self.out_bytes_s * out, self.in_bytes_s * into)
        scale = min(1.0, self.both_bytes_s / max(sum(wanted), 1e-300))
        return wanted[0] * scale, wanted[1] * scale


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of compute, or bytes of a copy, on a stream; begins after the work at ``after`` (positions)."""

    stream: Stream
    amount: float
    after: tuple[int, ...] = ()


@dataclass(slots=True)
class _Queue:
    """The work of one stream and how far it is."""

    waiting: list[int] = field(default_factory=list)
    """positions, last first"""
    running: int | None = None
    left: float = 0.0
    delay_s: float = 0.0


def run(works: Sequence[Work], link: Link) -> list[float]:
    """Seconds at which each work ends. Work may only wait for work before it."""
    queues = {stream: _Queue() for stream in Stream}
    for position in range(len(works) - 1, -1, -1):
        queues[works[position].stream].waiting.append(position)
    ends = [math.inf] * len(works)
    now = 0.0
    while any(queue.waiting or queue.running is not None for queue in queues.values()):
        for stream, queue in queues.items():
            _begin(queue, works, ends, now, latency_s=0.0 if stream is Stream.COMPUTE else link.latency_s)
        rates = _rates(queues, link)
        step = min(_time_left(queue, rates[stream]) for stream, queue in queues.items())
        now += step
        for stream, queue in queues.items():
            _advance(queue, step, rates[stream])
            if queue.running is not None and queue.left <= 0.0 and queue.delay_s <= 0.0:
                ends[queue.running], queue.running = now, None
    return ends


def _begin(queue: _Queue, works: Sequence[Work], ends: list[float], now: float, *, latency_s: float) -> None:
    if queue.running is None and queue.waiting:
        work = works[queue.waiting[-1]]
        if all(ends[each] <= now for each in work.after):
            queue.running = queue.waiting.pop()
            queue.left, queue.delay_s = work.amount, latency_s


def _rates(queues: dict[Stream, _Queue], link: Link) -> dict[Stream, float]:
    busy = {stream: queue.running is not None and queue.delay_s <= 0.0 for stream, queue in queues.items()}
    out, into = link.rates(out=busy[Stream.OUT], into=busy[Stream.IN])
    return {Stream.COMPUTE: 1.0, Stream.OUT: out, Stream.IN: into}


def _time_left(queue: _Queue, rate: float) -> float:
    """Until something changes on this stream; nothing does while it waits for another."""
    if queue.running is None:
        return math.inf
    return queue.delay_s if queue.delay_s > 0.0 else queue.left / rate


def _advance(queue: _Queue, step: float, rate: float) -> None:
    if queue.running is None:
        return
    if queue.delay_s > 0.0:
        queue.delay_s = 0.0 if queue.delay_s <= step else queue.delay_s - step
        return
    left = queue.left - step * rate
    queue.left = left if left > 1e-9 * max(queue.left, 1e-300) else 0.0


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """What a step took."""

    total_s: float
    compute_s: float
    """forward and backward alone"""
    recompute_s: float

    @property
    def stall_s(self) -> float:
        """Time in which the compute stream waited."""
        return max(0.0, self.total_s - self.compute_s - self.recompute_s)


def simulate(task: ActivationTask, policy: Policy, link: Link) -> SimulatedStep:
    """Run the events of ``task`` under ``policy`` over ``link``, whatever bandwidth the task believes in."""
    works: list[Work] = []
    free: dict[int, tuple[int, ...]] = {}
    """what ends when a rounding buffer may be filled again"""
    out_of: dict[tuple[int, int], tuple[int, ...]] = {}

    def add(stream: Stream, amount: float, *after: int) -> int:
        works.append(Work(stream, amount, after))
        return len(works) - 1

    again = [recompute_s(task, policy, layer) for layer in range(task.num_layers)]
    swap = [group_bytes(task, tokens) for tokens in policy.swapped]
    made_again = computed = 0.0
    for event in task.events:
        key, layer = (event.micro_batch, event.layer), event.layer
        needs = () if event.resident and event.backward else free.get(event.buffer, ())
        if event.backward and not event.resident:
            if swap[layer]:
                needs = (add(Stream.IN, swap[layer], *needs, *out_of[key]),)
            if again[layer]:
                needs = (add(Stream.COMPUTE, again[layer], *needs),)
                made_again += again[layer]
        seconds = task.backward_s if event.backward else task.forward_s
        computed += seconds
        done = (add(Stream.COMPUTE, seconds, *needs),)
        if not event.backward and not event.resident and swap[layer]:
            done = (add(Stream.OUT, swap[layer], *done),)
            out_of[key] = done
        free[event.buffer] = done
    return SimulatedStep(max(run(works, link), default=0.0), computed, made_again)
