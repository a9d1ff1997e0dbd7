"""A network that is asked for a fault and comes to it too late: what is written down as failed never happens."""

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest

from distrain.core import netns
from distrain.faults.inject import injector
from distrain.faults.inject.control import LINE_BYTES, Control, Lines, encode
from distrain.faults.inject.links import Impairment, cut
from distrain.launch.switch import Switch

SILENT_S = 45.0


class Slow(Control):
    """The network's end of the line to the injector, which it reads, or answers, only when it may."""

    def __init__(self, connection: socket.socket, *, late: str) -> None:
        super().__init__(connection)
        self.may_go_on = threading.Event()
        self._late = late

    def receive(self) -> list[Mapping[str, Any]] | None:
        if self._late == "reads":
            self.may_go_on.wait(SILENT_S)
        return super().receive()

    def tell(self, **table: Any) -> None:
        if self._late == "answers":
            self.may_go_on.wait(SILENT_S)
        super().tell(**table)


class Pair:
    """Two nodes whose devices are sockets, and who carries their packets."""

    def __init__(self, stack: ExitStack, *, late: str) -> None:
        def sockets(kind: int) -> tuple[socket.socket, socket.socket]:
            first, second = socket.socketpair(socket.AF_UNIX, kind)
            return stack.enter_context(first), stack.enter_context(second)

        self.injector, theirs = sockets(socket.SOCK_STREAM)
        self.network = Slow(theirs, late=late)
        joining, ours = sockets(socket.SOCK_SEQPACKET)
        self.nodes = []
        for node in range(2):
            here, device = sockets(socket.SOCK_SEQPACKET)
            device.setblocking(False)
            here.settimeout(SILENT_S)
            socket.send_fds(ours, [b"%d" % node], [device.fileno()])
            self.nodes.append(here)
        end, lifeline = os.pipe()
        switch = Switch(joining, lifeline=end, control=self.network, is_alive=lambda: False)
        thread = threading.Thread(target=switch.run)
        thread.start()
        stack.callback(os.close, end)
        stack.callback(thread.join)
        stack.callback(os.close, lifeline)
        stack.callback(self.network.may_go_on.set)

    def send(self, text: bytes, *, to: int = 1) -> None:
        """A packet of node 0."""
        self.nodes[0].send(b"\x45".ljust(16, b"\0") + socket.inet_aton(netns.address(to)) + text)

    def received(self, *, by: int = 1) -> bytes:
        return self.nodes[by].recv(2048)[20:]


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, late=request.param)


@pytest.mark.parametrize("pair", ["reads", "answers"], indirect=True)
def test_a_fault_that_the_network_did_not_confirm_in_time_never_happens(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(injector, "ORDER_S", 0.1)
    with pytest.raises(OSError, match="did not answer"):
        injector._order(pair.injector, do="impair", name="0/0", what=cut(1).to_json())
    pair.network.may_go_on.set()
    monkeypatch.setattr(injector, "ORDER_S", SILENT_S)
    injector._order(pair.injector, do="lift", name="1/0")  # all that was said before has been heard now
    pair.send(b"hello")
    assert pair.received() == b"hello"


@pytest.mark.parametrize("pair", ["never"], indirect=True)
def test_a_fault_that_the_network_confirms_is_at_work(pair: Pair) -> None:
    what = Impairment(ways=((0, 1),), loss=1.0)
    injector._order(pair.injector, do="impair", name="0/0", what=what.to_json())
    pair.send(b"lost")
    pair.send(b"to myself", to=0)  # once it is back, whatever was sent before has met its fate
    assert pair.received(by=0) == b"to myself"
    injector._order(pair.injector, do="lift", name="0/0")
    pair.send(b"hello")
    assert pair.received() == b"hello"


@pytest.mark.parametrize("pair", ["never"], indirect=True)
def test_an_order_whose_time_is_over_is_refused(pair: Pair) -> None:
    """As the network finds it that was held up before it could read."""
    what = cut(1).to_json()
    pair.injector.sendall(
        encode({"do": "impair", "name": "0/0", "what": what, "until_ns": time.monotonic_ns()})
    )
    (answer,) = Lines().add(pair.injector.recv(LINE_BYTES))
    assert answer == {"failed": "0/0", "reason": "it came too late"}
    pair.send(b"hello")
    assert pair.received() == b"hello"
