"""Copies run on streams of their own: on a device whose copies come as late as they may, nothing is read too early."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distrain.activation.host_pool import HostPool, near, node_processors
from distrain.activation.manager import ActivationManager
from distrain.activation.traffic import Traffic
from distrain.core.device import CpuDevice, CpuEvent, Device
from distrain.planners.activation_plan import ActivationPlan, LayerPlan, Split, snap

NUM_TOKENS, WIDTH = 256, 16


@dataclass
class LateStream:
    """Work that is done when somebody waits for it."""

    work: list[Any] = field(default_factory=list)
    done: int = 0

    def finish(self, number: int) -> None:
        """Do the work up to ``number``."""
        while self.done < number:
            self.done += 1
            self.work[self.done - 1]()

    def wait_event(self, event: "LateEvent") -> None:
        if event.stream is not None:
            self.work.append(event.synchronize)

    def wait_stream(self, stream: Any) -> None:
        if isinstance(stream, LateStream):
            number = len(stream.work)
            self.work.append(lambda: stream.finish(number))

    def synchronize(self) -> None:
        self.finish(len(self.work))


class Now:
    """The compute stream: its work is done at once, so that it waits at once."""

    def wait_event(self, event: "LateEvent") -> None:
        event.synchronize()

    def wait_stream(self, stream: Any) -> None:
        stream.synchronize()

    def synchronize(self) -> None:
        pass


@dataclass
class LateEvent:
    """A place in a stream's work."""

    stream: LateStream | None = None
    number: int = 0

    def record(self, stream: Any = None) -> None:
        if isinstance(stream, LateStream):
            self.stream, self.number = stream, len(stream.work)

    def query(self) -> bool:
        return self.stream is None or self.stream.done >= self.number

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.finish(self.number)

    def elapsed_time(self, end_event: Any) -> float:
        return 0.0


class _Late(TorchDispatchMode):
    """Puts copies off."""

    def __init__(self, stream: LateStream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = stream

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self.stream.work.append(lambda: func(*args))
        return args[0]


class LateDevice(CpuDevice):
    """A processor with streams that do nothing unless they must."""

    def __init__(self) -> None:
        self.streams: list[LateStream] = []

    def stream(self) -> Any:
        self.streams.append(LateStream())
        return self.streams[-1]

    def current_stream(self) -> Any:
        return Now()

    @contextmanager
    def use(self, stream: Any) -> Iterator[Any]:
        with _Late(stream):
            yield stream

    def event(self, *, timing: bool = False) -> Any:
        return LateEvent()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(self.up(x).sin().exp())
        return result


def gradients(layers: nn.ModuleList) -> list[Tensor]:
    layers.zero_grad()
    x = torch.randn(1, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = x
    for layer in layers:
        y = layer(y)
    y.square().mean().backward()
    return [each.grad for each in (x, *layers.parameters()) if each.grad is not None]


@pytest.mark.parametrize("swap", [1.0, 0.5])
def test_gradients_are_right_if_every_copy_is_as_late_as_it_may_be(swap: float) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([Layer() for _ in range(5)])
    truth = gradients(layers)
    device = LateDevice()
    plan = ActivationPlan(layers=(LayerPlan.of(snap(NUM_TOKENS, swap=swap)),) * 5)
    with ActivationManager(layers, plan, device=device) as manager:
        for _ in range(2):  # the second step's blocks are the first one's
            assert all(map(torch.equal, gradients(layers), truth))
    assert manager.report().num_fetched_ahead == 8
    assert sum(len(stream.work) for stream in device.streams) > 20


class Count(TorchDispatchMode):
    """Counts what was asked of the compute stream."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_asked = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.num_asked += 1
        return func(*args, **(kwargs or {}))


@dataclass
class WatchedStream:
    """Knows how far it has waited for the compute stream, which is watched by itself."""

    count: Count
    seen: int = 0

    def wait_event(self, event: Any) -> None:
        self.seen = max(self.seen, event.place)

    def wait_stream(self, stream: Any) -> None:
        self.seen = self.count.num_asked


class WatchedEvent(CpuEvent):
    """Keeps where the compute stream was."""

    place = 0

    def record(self, stream: Any = None) -> None:
        self.place = stream.count.num_asked if isinstance(stream, WatchedStream) else 0


class WatchedDevice(CpuDevice):
    """A processor that notes, for each round of copies, whether they had waited for all that was asked before."""

    def __init__(self, count: Count) -> None:
        self.count = count
        self.waited: list[bool] = []

    def stream(self) -> Any:
        return WatchedStream(self.count)

    def current_stream(self) -> Any:
        return WatchedStream(self.count)

    @contextmanager
    def use(self, stream: Any) -> Iterator[Any]:
        self.waited.append(stream.seen == self.count.num_asked)
        yield stream

    def event(self, *, timing: bool = False) -> Any:
        return WatchedEvent()


def test_copies_wait_for_what_made_their_source_and_for_who_had_their_target_before() -> None:
    layers = nn.ModuleList([Layer() for _ in range(3)])
    plan = ActivationPlan(layers=(LayerPlan.of(snap(NUM_TOKENS, swap=0.5)),) * 3)
    with Count() as count:
        device = WatchedDevice(count)
        with ActivationManager(layers, plan, device=device):
            gradients(layers)
    assert device.waited == [True] * 6, "one round out and one in for each layer"


def test_at_most_two_layers_are_on_the_device_while_copies_are_late() -> None:
    device = LateDevice()
    traffic = Traffic(device)
    for layer in range(4):
        traffic.let_go()
        assert device.streams[0].done >= max(0, layer - 1)
        traffic.send_out([(torch.full((4,), float(layer)), torch.empty(4))])
    traffic.close()
    assert traffic.out_bytes == 4 * 16


def test_a_block_that_comes_back_can_be_taken_again_and_neighbours_join() -> None:
    pool = HostPool(CpuDevice(), limit_bytes=4096)
    pool.reserve(4096)
    blocks = [pool.take(1000) for _ in range(4)]
    assert None not in blocks and pool.take(1) is None
    for i in (1, 3, 0, 2):
        pool.give_back(blocks[i])  # type: ignore[arg-type]
    assert pool.held_bytes == 0 and pool.peak_bytes == 4096 and pool.num_refused == 1
    whole = pool.take(4096)
    assert whole is not None and whole.memory.numel() == 4096


def test_a_pool_grows_to_its_limit_and_no_further() -> None:
    pool = HostPool(CpuDevice(), limit_bytes=10_000)
    assert pool.reserved_bytes == 0
    assert pool.take(6000) is not None
    assert pool.reserved_bytes == 10_000
    assert pool.take(6000) is None
    assert HostPool(CpuDevice()).take(10) is not None


def test_arenas_are_touched_on_the_processors_of_the_device_s_node() -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("with one processor there is nothing to choose")
    device: Device = CpuDevice()
    there, elsewhere = {min(before)}, {max(before) + 1}
    for processors, expected in ((there | elsewhere, there), (elsewhere, before), (set(), before)):
        with near(device, processors_of=dict.fromkeys([device], processors).__getitem__):
            assert os.sched_getaffinity(0) == expected
        assert os.sched_getaffinity(0) == before


def test_a_node_that_the_machine_does_not_have_has_no_processors() -> None:
    assert node_processors(10_000) == set()
    if Path("/sys/devices/system/node/node0/cpulist").exists():
        assert node_processors(0)


def test_a_manager_takes_the_device_of_its_layers() -> None:
    layer = nn.Linear(4, 4)
    manager = ActivationManager([layer], ActivationPlan(layers=(LayerPlan.of(Split(swap=128)),)))
    device: Device = manager.device
    assert isinstance(device, CpuDevice)
    with pytest.raises(Exception, match="listed twice"):
        ActivationManager([layer, layer], ActivationPlan(layers=(LayerPlan.of(Split(swap=128)),) * 2))
