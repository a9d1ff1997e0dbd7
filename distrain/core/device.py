"""The one seam between Distrain and the device it computes on.

Everything that streams, events, pinned memory, memory statistics and device names are needed for goes through
a ``Device``, of which there are two: CUDA, and a CPU whose streams and events are stand-ins. Work on a CPU is
done when the call returns, so its streams have nothing to order and waiting for them is a no-op; its events keep
the time at which they were recorded. Code written against the seam runs, and is tested, without a GPU.
"""

import re
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import prod
from typing import Any, Protocol

import torch

from . import host
from .errors import ConfigError
from .page_locked import page_locked
from .vocabulary import DEVICES, DeviceSpec


class Event(Protocol):
    """A point in the work of a stream; torch.cuda.Event is one."""

    def record(self, stream: Any = None) -> None:
        """Mark the point that ``stream`` (default: the current one) has been asked to reach."""

    def query(self) -> bool:
        """Whether the point is reached."""

    def synchronize(self) -> None:
        """Block the host until it is."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to ``end_event``; both recorded with timing."""


class Stream(Protocol):
    """A queue of work in order; torch.cuda.Stream is one."""

    def wait_event(self, event: Any) -> None:
        """Let later work of this stream wait for ``event``."""

    def wait_stream(self, stream: Any) -> None:
        """Let later work of this stream wait for the present work of ``stream``."""

    def synchronize(self) -> None:
        """Block the host until the work is done."""


class CpuEvent:
    """An event of work that is done as soon as it is asked for; keeps the time of its recording."""

    def __init__(self) -> None:
        self._time_ns: int | None = None

    def record(self, stream: Any = None) -> None:
        """Keep the present time."""
        self._time_ns = time.perf_counter_ns()

    def query(self) -> bool:
        """Always: the work before it was done when it was recorded."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end_event: "CpuEvent") -> float:
        """Milliseconds to ``end_event``; raises RuntimeError, as CUDA does, if one was not recorded."""
        if self._time_ns is None or end_event._time_ns is None:
            raise RuntimeError("both events must be recorded before the time between them is known")
        return (end_event._time_ns - self._time_ns) / 1e6


class CpuStream:
    """A stream whose work is done when the call returns."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Device(ABC):
    """What a rank computes on."""

    torch_device: torch.device
    backend: str
    """torch.distributed backend of its collectives"""

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream."""

    @abstractmethod
    def current_stream(self) -> Stream:
        """The stream that work goes to now."""

    @abstractmethod
    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Send the work of a ``with`` block to ``stream``."""

    @abstractmethod
    def event(self, *, timing: bool = False) -> Event:
        """A new event, for ``elapsed_time`` if ``timing``."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until all streams are done."""

    @abstractmethod
    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies to and from asynchronously, uninitialised."""

    @abstractmethod
    def memory_bytes(self) -> int:
        """Memory that the device has."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """Most memory held at one time since ``reset_peak_memory``: tensors on CUDA, the process on a CPU."""

    @abstractmethod
    def reset_peak_memory(self) -> None:
        """Start the peak anew."""

    @abstractmethod
    def spec(self) -> DeviceSpec:
        """Name, memory and peak FLOP/s; datasheet values where the device is known, otherwise measured."""

    def seed(self, seed: int) -> None:
        """Seed torch's generators of host and device."""
        torch.manual_seed(seed)


class CpuDevice(Device):
    """The processor, through the same face as a GPU."""

    torch_device = torch.device("cpu")
    backend = "gloo"

    def stream(self) -> Stream:
        return CpuStream()

    def current_stream(self) -> Stream:
        return CpuStream()

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext(stream)

    def event(self, *, timing: bool = False) -> Event:
        return CpuEvent()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def memory_bytes(self) -> int:
        return host.host_memory_bytes()

    def peak_memory_bytes(self) -> int:
        return host.peak_resident_bytes()

    def reset_peak_memory(self) -> None:
        host.reset_peak_resident()

    def spec(self) -> DeviceSpec:
        return DeviceSpec(
            name="cpu", memory_bytes=self.memory_bytes(), peak_flops=measured_flops(self, dtype=torch.float32)
        )


class CudaDevice(Device):
    """One GPU."""

    backend = "nccl"

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)

    def stream(self) -> Stream:
        return torch.cuda.Stream(self.torch_device)

    def current_stream(self) -> Stream:
        return torch.cuda.current_stream(self.torch_device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def event(self, *, timing: bool = False) -> Event:
        return torch.cuda.Event(enable_timing=timing)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def pinned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        numel = prod(shape)
        if numel == 0:
            return torch.empty(shape, dtype=dtype)
        with torch.cuda.device(self.torch_device):
            runtime: Any = torch.cuda.cudart()
            pages = page_locked(numel * dtype.itemsize, runtime=runtime, synchronize=self.synchronize)
        return torch.frombuffer(pages, dtype=dtype, count=numel).view(shape)

    def memory_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.torch_device).total_memory)

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch_device)

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def spec(self) -> DeviceSpec:
        name = torch.cuda.get_device_name(self.torch_device)
        known = known_device(name, memory_bytes=self.memory_bytes())
        if known is not None:
            return known
        flops = measured_flops(self, dtype=torch.bfloat16, size=8192)
        return DeviceSpec(name=name, memory_bytes=self.memory_bytes(), peak_flops=flops)


def open_device(kind: str = "auto", *, local_rank: int = 0) -> Device:
    """The device of the rank ``local_rank`` of its node; ``auto`` takes CUDA where there is a GPU.

    Raises:
        ConfigError: ``cuda`` is asked for and there is none, or there are fewer GPUs than local ranks.
    """
    num_gpus = 0 if kind == "cpu" else torch.cuda.device_count()
    if kind == "cpu" or (kind == "auto" and num_gpus == 0):
        return CpuDevice()
    if local_rank >= num_gpus:
        raise ConfigError(
            "there is no GPU for this rank",
            got=f"local rank {local_rank}, {num_gpus} GPUs",
            allowed=f"at most {num_gpus} ranks on this node" if num_gpus else "launch.device = cpu",
            hint=f"--set launch.ranks={num_gpus}" if num_gpus else "--set launch.device=cpu",
        )
    torch.cuda.set_device(local_rank)
    return CudaDevice(local_rank)


def known_device(name: str, *, memory_bytes: int) -> DeviceSpec | None:
    """The datasheet entry for a driver's device name, with the memory it really has; None if unknown."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    family = [spec for key, spec in DEVICES.items() if key.partition("-")[0] in words]
    if not family:
        return None
    nearest = min(family, key=lambda spec: abs(spec.memory_bytes - memory_bytes))
    return replace(nearest, memory_bytes=memory_bytes)


def measured_flops(device: Device, *, dtype: torch.dtype, size: int = 1024, budget_s: float = 0.1) -> float:
    """FLOP/s of the best matrix product of ``size`` that was seen in about ``budget_s``, after one to warm up."""
    matrix = torch.ones(size, size, dtype=dtype, device=device.torch_device)
    best_s, start = float("inf"), time.perf_counter()
    for round_number in range(1000):
        device.synchronize()
        before = time.perf_counter()
        torch.mm(matrix, matrix)
        device.synchronize()
        now = time.perf_counter()
        if round_number:
            best_s = min(best_s, now - before)
            if now - start > budget_s:
                break
    return 2.0 * size**3 / best_s
