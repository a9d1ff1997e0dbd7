"""What one process can do to others: kill them, stop them, slow them down, take their memory, cut them off.

Each effect is a function of whom it hits and returns what undoes it. All of them raise OSError if the kernel refuses.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distrain.core.vocabulary import FaultKind

from .cgroups import Controller, Group, fellows, find_controller
from .kinds import KINDS
from .links import cut, impairment
from .plan import Fault
from .timers import Timers

STOPPED_WITHIN_S = 5.0
LOOK_S = 0.1
"""between two looks whether a frozen process is to be killed"""
DUTY_PERIOD_S = 0.1


@dataclass(frozen=True, slots=True)
class Hit:
    """One fault and the processes that it hits."""

    fault: Fault
    pids: Sequence[int]
    timers: Timers
    name: str = ""
    """of the fault on this victim"""
    seed: int = 0
    order: Callable[..., None] | None = None
    """asks whoever carries the nodes' packets, if somebody does, and waits until it is done; raises OSError"""

    def param(self, name: str) -> Any:
        """A parameter of the fault, or its default."""
        return KINDS[self.fault.kind].param(self.fault.params, name)


Undo = Callable[[], object]
Effect = Callable[[Hit], Undo | None]


def kill(hit: Hit) -> None:
    """End processes as the kernel does when a machine dies: at once, and without their say."""
    for pid in hit.pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def lose(hit: Hit) -> None:
    """Take a node away: nothing that it still had to say arrives, and all that runs there ends."""
    if hit.order:
        hit.order(do="impair", name=hit.name, what=cut(hit.fault.target.node or 0).to_json())
    kill(hit)


def impair(hit: Hit) -> Undo:
    """Do something to the packets between nodes."""
    order = hit.order
    if order is None:
        raise ConnectionError("the nodes have no network of their own")
    order(do="impair", name=hit.name, what=impairment(hit.fault, seed=hit.seed).to_json())
    return lambda: order(do="lift", name=hit.name)


def stop(hit: Hit) -> Undo:
    """Stop all threads of a process; its connections stay open and are not read."""
    (pid,) = hit.pids
    os.kill(pid, signal.SIGSTOP)
    _wait_until_stopped(pid)
    return lambda: _go_on(pid)


def freeze(hit: Hit) -> Undo:
    """Stop a process so that not even SIGKILL reaches it, as one that hangs in a driver.

    Only the hang is wanted, not its consequence for whoever cleans up: a process that is being killed is let go.
    """
    (pid,) = hit.pids
    group = Group(_needed("freezer"))
    try:
        group.join(pid)
        group.freeze()
    except OSError:
        group.close()
        raise
    undo = _once(group.close)

    def look() -> None:
        if _is_killed(pid):
            with suppress(OSError):
                undo()
        elif group.path.exists():
            hit.timers.after(LOOK_S, look)

    hit.timers.after(LOOK_S, look)
    return undo


def throttle(hit: Hit) -> Undo:
    """Give a process a share of one core: by a quota or, where that is not allowed, by stopping it in turns."""
    (pid,) = hit.pids
    quota = hit.param("quota")
    controller = find_controller("cpu")
    if controller is None:
        return _DutyCycle(pid, quota, hit.timers).end
    group = Group(controller)
    try:
        group.limit_cpu(quota)
        group.join(pid)
    except OSError:
        group.close()
        raise
    return _once(group.close)


def starve(hit: Hit) -> Undo:
    """Let a process have little more memory than it has; what it asks for beyond that ends it."""
    (pid,) = hit.pids
    group = Group(_needed("memory"))
    try:
        group.limit_memory(hit.param("headroom_mib") << 20)
        group.join(pid)
    except OSError:
        group.close()
        raise
    return _once(group.close)


EFFECTS: Mapping[FaultKind, Effect] = MappingProxyType(
    {
        FaultKind.PROC_KILL: kill,
        FaultKind.PROC_STOP: stop,
        FaultKind.PROC_CPU_THROTTLE: throttle,
        FaultKind.CGROUP_FREEZE: freeze,
        FaultKind.PROC_OOM: starve,
        FaultKind.SIDECAR_KILL: kill,
        FaultKind.STORE_KILL: kill,
        FaultKind.COORDINATOR_KILL: kill,
        FaultKind.NODE_LOSS: lose,
        FaultKind.NET_DROP: impair,
        FaultKind.NET_LOSS: impair,
        FaultKind.NET_RATE: impair,
        FaultKind.NET_DELAY: impair,
        FaultKind.NET_PARTITION: impair,
        FaultKind.NET_FLAP: impair,
    }
)


class _DutyCycle:
    """Stops a process and lets it go on, in turns."""

    def __init__(self, pid: int, quota: float, timers: Timers) -> None:
        self._pid, self._timers = pid, timers
        self._shares = (DUTY_PERIOD_S * (1 - quota), DUTY_PERIOD_S * quota)
        self._is_over = False
        self._turn(stops=True)

    def end(self) -> None:
        """Let the process run."""
        self._is_over = True
        _go_on(self._pid)

    def _turn(self, *, stops: bool) -> None:
        if self._is_over:
            return
        try:
            os.kill(self._pid, signal.SIGSTOP if stops else signal.SIGCONT)
        except ProcessLookupError:
            return
        self._timers.after(self._shares[0 if stops else 1], lambda: self._turn(stops=not stops))


def store_of(rank_pid: int) -> list[int]:
    """The process that serves the store of the job, a child of the rank's agent."""
    agent = _parent(rank_pid)
    return [pid for pid in _children(agent) if b"distrain.launch.store" in _command(pid)]


def agent_of(rank_pid: int) -> list[int]:
    """The launcher's process on the rank's node; nobody if the rank was not started by one."""
    agent = _parent(rank_pid)
    words = _command(agent).split(b"\0")
    is_agent = any(os.path.basename(word) in (b"distrain", b"distrain.launch.emulate") for word in words)
    return [agent] if is_agent else []


def node_of(rank_pid: int) -> list[int]:
    """Everything that runs on the rank's emulated node, the agent first, as far as that can be told.

    But for whoever cleans up after the agent: the machine on which the node is emulated lives on.
    """
    others = [pid for pid in fellows(rank_pid) if b"distrain.launch.reaper" not in _command(pid)]
    return list(dict.fromkeys([*agent_of(rank_pid), *others]))


def _children(parent: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and _parent(int(entry.name)) == parent:
            yield int(entry.name)


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """State, parent and what follows; nothing if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + STOPPED_WITHIN_S
    while (fields := _stat(pid)) and fields[0] not in "TZX":
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not stop")
        time.sleep(0.001)


def _go_on(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _is_killed(pid: int) -> bool:
    """Whether SIGKILL waits for a frozen process; true as well if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True
    masks = (int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:")))
    return any(mask >> (signal.SIGKILL - 1) & 1 for mask in masks)


def _needed(name: str) -> Controller:
    controller = find_controller(name)
    if controller is None:
        raise PermissionError(f"no control group with the {name} controller can be made")
    return controller


def _once(action: Callable[[], object]) -> Undo:
    """``action``, the first time that it is called."""
    left = [action]
    return lambda: left.pop()() if left else None
