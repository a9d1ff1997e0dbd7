"""The requests that a CUDA allocator recorded, as buffers: what really happened on a GPU, to be planned anew.

On a GPU, around the steps that are of interest::

    torch.cuda.memory._record_memory_history()
    train_a_step()
    json.dump(torch.cuda.memory._snapshot(), open("step.json", "w"), default=str)

A snapshot holds the events of each device: ``alloc`` and ``free_requested`` (or ``free_completed``) with address and
size. The time of a buffer is the number of its event. Addresses are reused, so an event belongs to the last buffer that
was there. What was there before the recording, or outlives it, is said by ``Recorded``. torch's own form of a snapshot
is a pickle, which can run code when it is read; so it is read as JSON.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.core.errors import ConfigError, Problem, raise_if
from distrain.planners.buffers import Buffer


@dataclass(frozen=True, slots=True)
class Recorded:
    """Requests of one device, in the order in which they came."""

    buffers: tuple[Buffer, ...]
    num_older: int
    """freed while it was recorded, but allocated before: lifetimes unknown, left out"""
    num_younger: int
    """not freed when the recording ended: taken to live to its end"""


def read_snapshot(path: Path, *, device: int = 0) -> Recorded:
    """The buffers of ``device`` in the JSON file ``path``; ConfigError if it is none."""
    try:
        found = json.loads(path.read_text())
        traces = found["device_traces"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "a memory snapshot cannot be read",
            got=f"{path}: {type(error).__name__}: {error}",
            allowed="torch.cuda.memory._snapshot() as JSON",
        ) from None
    if not 0 <= device < len(traces):
        allowed = f"0 to {len(traces) - 1}" if traces else "a snapshot with events"
        raise ConfigError("the snapshot has no such device", got=str(device), allowed=allowed)
    return from_events(traces[device])


def from_events(events: list[Mapping[str, Any]]) -> Recorded:
    """Buffers of one device's trace; ConfigError lists events that cannot be true."""
    living: dict[int, tuple[str, int, int]] = {}
    done: list[Buffer] = []
    problems, num_older = [], 0
    freeing = (
        "free_requested"
        if any(each.get("action") == "free_requested" for each in events)
        else "free_completed"
    )
    for time, event in enumerate(events):
        action, address, size = event.get("action"), event.get("addr"), event.get("size")
        if action not in ("alloc", freeing):
            continue
        if not isinstance(address, int) or not isinstance(size, int) or size < 0:
            problems.append(Problem(f"event {time} lacks address or size", got=str(dict(event))[:200]))
        elif action == "alloc" and address in living:
            problems.append(
                Problem(
                    f"event {time} allocates what lives", got=f"address {address}, as {living[address][0]}"
                )
            )
        elif action == "alloc":
            living[address] = (f"event {time}", time, size)
        elif address in living:
            name, birth, size = living.pop(address)
            done.append(Buffer(name, birth, time, size))
        else:
            num_older += 1
    raise_if(problems)
    done += [Buffer(name, birth, len(events), size) for name, birth, size in living.values()]
    done.sort(key=lambda each: each.lower)
    return Recorded(tuple(done), num_older, len(living))
