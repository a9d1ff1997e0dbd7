"""Copies between device and host on two streams of their own, beside the one that computes.

::

    compute   forward 0 | forward 1 | forward 2 | ...            backward 2 | backward 1 | backward 0
    D2H                 | out 0     | out 1     | ...
    H2D                                                          | in 1     | in 0

What is on its way out stays on the device until it has left: before layer i + 2 runs, the compute stream waits for
the copies of layer i, so that at most two layers are there at a time. The same two rounding buffers hold what comes
back: one of the layer whose backward runs, one of the layer before it.

On a processor streams are stand-ins and a copy is done when it was asked for.
"""

from collections import deque
from collections.abc import Sequence

from torch import Tensor

from distrain.core.device import Device, Event

IN_FLIGHT = 1
"""layers that may still be on their way out while another one runs"""


class Traffic:
    """The copies of one device."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._out = device.stream()
        self._in = device.stream()
        self._leaving: deque[tuple[Event, list[Tensor]]] = deque()
        self.out_bytes = 0
        self.in_bytes = 0

    def send_out(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Event:
        """Copy each (device, host) pair; the device's tensors are kept until they have left."""
        ready = self.device.event()
        ready.record(self.device.current_stream())
        self._out.wait_event(ready)
        done = self.device.event()
        with self.device.use(self._out):
            for source, target in copies:
                target.copy_(source, non_blocking=True)
                self.out_bytes += source.numel() * source.element_size()
            done.record(self._out)
        self._leaving.append((done, [source for source, _ in copies]))
        self.let_go(IN_FLIGHT + 1)
        return done

    def let_go(self, in_flight: int = IN_FLIGHT) -> None:
        """Let the compute stream wait until at most ``in_flight`` layers are on their way out, and free the others."""
        while self._leaving and (len(self._leaving) > in_flight or self._leaving[0][0].query()):
            done, _ = self._leaving.popleft()
            self.device.current_stream().wait_event(done)

    def fetch(self, copies: Sequence[tuple[Tensor, Tensor]], *, after: Event) -> Event:
        """Copy each (host, device) pair once ``after`` is reached; compute must wait for the event returned."""
        self._in.wait_event(after)
        self._in.wait_stream(self.device.current_stream())  # whose memory the targets were until now
        done = self.device.event()
        with self.device.use(self._in):
            for source, target in copies:
                target.copy_(source, non_blocking=True)
                self.in_bytes += source.numel() * source.element_size()
            done.record(self._in)
        return done

    def wait_for(self, done: Event) -> None:
        """Let the compute stream wait for a fetch."""
        self.device.current_stream().wait_event(done)

    def close(self) -> None:
        """Wait for everything on its way."""
        self.let_go(0)
