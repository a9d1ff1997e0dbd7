"""The clock: what a policy takes in time and memory, event by event, on three streams.

::

    compute   F0 F1 F2 F3 B3 B2 [R1] B1 [R0] B0       [R]: the tokens that are made again
    to host      0  1
    from host            1   0

Copies of a direction queue behind each other. Forward takes a rounding buffer when what was there two events ago has
left it; backward begins when its activations have come back. Waiting of the compute stream is *stall*.
"""

from dataclasses import dataclass

from .problem import ROUNDING_BUFFERS, ActivationTask, Event, Policy


@dataclass(frozen=True, slots=True)
class Span:
    """Something that a stream does."""

    stream: str
    """compute, recompute, to host, from host"""
    label: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of it."""

    spans: tuple[Span, ...]
    total_s: float
    stall_s: float
    recompute_s: float
    host_bytes: float
    """the most that was on the host at once"""
    device_bytes: float
    """rounding buffers, and the most that was kept at once"""

    @property
    def compute_s(self) -> float:
        """Forward and backward alone."""
        return self.total_s - self.stall_s - self.recompute_s


def group_bytes(task: ActivationTask, tokens: tuple[int, ...]) -> float:
    """Bytes of so many tokens of each group."""
    return sum(
        group.num_bytes * count / task.num_tokens for group, count in zip(task.groups, tokens, strict=True)
    )


def recompute_s(task: ActivationTask, policy: Policy, layer: int) -> float:
    """Time to make again what is neither kept nor swapped of ``layer``; ValueError if that is not done."""
    seconds = 0.0
    for group, kept, swapped in zip(task.groups, policy.kept[layer], policy.swapped[layer], strict=True):
        rest = task.num_tokens - kept - swapped
        if rest and group.recompute_s is None:
            raise ValueError(
                f"{group.name} of layer {layer} is not made again, but {rest} tokens are dropped"
            )
        seconds += (group.recompute_s or 0.0) * rest / task.num_tokens
    return seconds


def replay(task: ActivationTask, policy: Policy) -> Replay:
    """Run all events of ``task`` under ``policy``."""
    spans: list[Span] = []
    swap = [group_bytes(task, each) for each in policy.swapped]
    keep = [group_bytes(task, each) for each in policy.kept]
    again = [recompute_s(task, policy, layer) for layer in range(task.num_layers)]
    compute = outward = inward = stall = recomputed = 0.0
    free = [0.0] * ROUNDING_BUFFERS  # when each rounding buffer is
    at_host: dict[tuple[int, int], float] = {}
    host = device = host_peak = device_peak = 0.0
    for event in task.events:
        key, layer = (event.micro_batch, event.layer), event.layer
        ready = compute
        if not (event.resident and event.backward):
            ready = max(ready, free[event.buffer])
        if event.backward and not event.resident and swap[layer]:
            begin = max(inward, free[event.buffer], at_host[key])
            inward = begin + swap[layer] / task.h2d_bytes_s
            spans.append(Span("from host", _label(event), begin, inward))
            ready = max(ready, inward)
        stall += ready - compute
        compute = ready
        if event.backward and not event.resident and again[layer]:
            spans.append(Span("recompute", _label(event), compute, compute + again[layer]))
            compute += again[layer]
            recomputed += again[layer]
        end = compute + (task.backward_s if event.backward else task.forward_s)
        spans.append(Span("compute", _label(event), compute, end))
        compute = free[event.buffer] = end
        if event.resident:
            continue
        if event.backward:
            host, device = host - swap[layer], device - keep[layer]
            continue
        if swap[layer]:
            begin = max(outward, end)
            free[event.buffer] = outward = begin + swap[layer] / task.d2h_bytes_s
            spans.append(Span("to host", _label(event), begin, outward))
        at_host[key] = free[event.buffer]
        host, device = host + swap[layer], device + keep[layer]
        host_peak, device_peak = max(host_peak, host), max(device_peak, device)
    buffers = ROUNDING_BUFFERS * task.layer_bytes
    return Replay(tuple(spans), compute, stall, recomputed, host_peak, buffers + device_peak)


def _label(event: Event) -> str:
    return f"{'B' if event.backward else 'F'}{event.layer}.{event.micro_batch}"
