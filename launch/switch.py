"""Carries packets between the emulated nodes of a job, as cables and switches do, with the faults that these have.

A process of its own: ``python -m distrain.launch.switch NODES FD``. Every node is a network namespace whose device the
node's agent hands over here (``core.netns``). A packet that a node sends is read from the one descriptor and written
to the other; on the way ``Links`` of ``faults.inject`` loses it or has it wait, as the injector of a drill says::

    node 0 ══ device ──►  read ──► Links: lost, late, or at once ──► write  ──► device ══ node 1
                                     ▲
    injector ──── impair, lift ──────┘

The process also owns the nodes' control groups, and outlives its parent by moments: when its standard input ends,
however the launcher ended, whatever runs in the groups has some time left to end by itself; then they are taken away.
"""

import heapq
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from distrain.core.netns import MAX_NODES, node_at
from distrain.faults.inject.arming import TRUTH
from distrain.faults.inject.cgroups import NODE, Group, find_controller
from distrain.faults.inject.control import Control
from distrain.faults.inject.links import Impairment, Links

LARGEST_PACKET_BYTES = 1 << 16
BATCH = 64
"""packets of one node before the next has its turn"""
MAX_WAITING = 128
"""packets for a node that has not come yet"""
GRACE_S, LOOK_S = 10.0, 0.05
"""what processes of the nodes have left after the launcher's end, and between two looks whether there are any"""
PRIORITY = -10
"""a network does not wait for its nodes' processors"""


class Switch:
    """All connections between nodes; ``run`` until the lifeline has ended and no node ``is_alive``."""

    def __init__(
        self,
        joining: socket.socket,
        *,
        lifeline: int,
        control: Control | None,
        is_alive: Callable[[], bool],
    ) -> None:
        self._joining, self._lifeline, self._control = joining, lifeline, control
        self._is_alive = is_alive
        self._gives_up_s: float | None = None
        self._links = Links()
        self._nodes: dict[int, int] = {}
        """by device"""
        self._devices: dict[int, int] = {}
        """by node"""
        self._waiting: dict[int, list[bytes]] = {}
        self._late: list[tuple[int, int, int, bytes]] = []
        """when, a running number, to which node, what"""
        self._numbers = count()
        self._poll = select.epoll()
        for fd in (joining.fileno(), lifeline, *([control.fileno()] if control else ())):
            self._poll.register(fd, select.EPOLLIN)

    def run(self) -> None:
        """Carry packets."""
        while not self._is_over():
            for fd, _ in self._poll.poll(self._patience_s()):
                if fd == self._lifeline:
                    self._poll.unregister(fd)
                    self._gives_up_s = time.monotonic() + GRACE_S
                elif fd == self._joining.fileno():
                    self._join()
                elif self._control and fd == self._control.fileno():
                    self._obey(self._control)
                else:
                    self._forward(fd)
            self._deliver()

    def _is_over(self) -> bool:
        if self._gives_up_s is None:
            return False
        return not self._is_alive() or time.monotonic() > self._gives_up_s

    def _patience_s(self) -> float | None:
        idle_s = None if self._gives_up_s is None else LOOK_S
        if not self._late:
            return idle_s
        late_s = max(0.0, (self._late[0][0] - time.monotonic_ns()) / 1e9)
        return late_s if idle_s is None else min(late_s, idle_s)

    def _join(self) -> None:
        """A node's agent hands over its device."""
        text, fds, _, _ = socket.recv_fds(self._joining, 16, 1)
        if not text:  # no agent is left
            self._poll.unregister(self._joining.fileno())
            return
        node, (device,) = int(text), fds
        self._nodes[device], self._devices[node] = node, device
        self._poll.register(device, select.EPOLLIN)
        for packet in self._waiting.pop(node, ()):
            self._write(node, packet)

    def _obey(self, control: Control) -> None:
        """The injector wants something; without it nothing is wrong any more."""
        tables = control.receive()
        if tables is None:
            self._poll.unregister(control.fileno())
            control.close()
            self._control = None
            self._links.lift_all()
        for table in tables or ():
            control.tell(**self._changed(table))

    def _changed(self, table: Mapping[str, Any]) -> dict[str, str]:
        name, now_ns = str(table.get("name")), time.monotonic_ns()
        try:
            if table.get("do") == "impair":
                if now_ns > table["until_ns"]:  # the injector has given it up, and said so
                    return {"failed": name, "reason": "it came too late"}
                self._links.impair(name, Impairment.from_json(table["what"]), now_ns=now_ns)
            else:
                self._links.lift(name)
        except (KeyError, TypeError, ValueError) as error:
            return {"failed": name, "reason": repr(error)}
        return {"done": name}

    def _forward(self, device: int) -> None:
        """Take what a node has sent."""
        source = self._nodes[device]
        for _ in range(BATCH):
            try:
                packet = os.read(device, LARGEST_PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError:  # the namespace is gone
                self._poll.unregister(device)
                return
            if packet[0] >> 4 != 4:  # not of IP version 4
                continue
            target, now_ns = node_at(packet[16:20]), time.monotonic_ns()
            if not 0 <= target < MAX_NODES:
                continue
            due_ns = self._links.arrives_ns(source, target, len(packet), now_ns=now_ns)
            if due_ns is None:
                continue
            if due_ns <= now_ns and not self._late:
                self._write(target, packet)
            else:
                heapq.heappush(self._late, (due_ns, next(self._numbers), target, packet))

    def _deliver(self) -> None:
        """Pass on what has waited long enough."""
        while self._late and self._late[0][0] <= time.monotonic_ns():
            _, _, target, packet = heapq.heappop(self._late)
            self._write(target, packet)

    def _write(self, node: int, packet: bytes) -> None:
        device = self._devices.get(node)
        if device is None:
            waiting = self._waiting.setdefault(node, [])
            if len(waiting) < MAX_WAITING:
                waiting.append(packet)
        else:
            with suppress(OSError):  # a node that is gone or full loses it
                os.write(device, packet)


def _groups(num_nodes: int) -> list[Group]:
    """A control group a node, where this machine allows that."""
    controller = find_controller("freezer")
    return [Group(controller, prefix=NODE) for _ in range(num_nodes)] if controller else []


def main(argv: Sequence[str]) -> None:
    """Say where the groups are, carry packets, and clean up."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    num_nodes, fd = map(int, argv)
    folder = os.environ.get(TRUTH)
    hello = {"role": "network", "rank": -1, "node": -1}
    groups = _groups(num_nodes)
    try:
        control = Control.connect(Path(folder), hello=hello) if folder else None
        print(json.dumps([str(group.path) for group in groups]), flush=True)
        Switch(
            socket.socket(fileno=fd),
            lifeline=sys.stdin.fileno(),
            control=control,
            is_alive=lambda: any(group.pids() for group in groups),
        ).run()
    finally:
        for group in groups:
            with suppress(OSError):  # the next run sweeps
                group.kill()
                group.close()


if __name__ == "__main__":
    main(sys.argv[1:])
