"""The native half of the allocator, as Python sees it: one ``Adapter`` for each kind of memory.

Both adapters are built from the same core (``plan_core.hpp``, ``session.hpp``) and answer to the same C functions; they
differ in how they get into torch. The CPU adapter comes and goes with every context. torch's CUDA allocator can be
replaced once, before its first use (``use_on_cuda``), and from then on plans come and go beneath it.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch

from distrain.core import native
from distrain.core.errors import ConfigError, MissingDependencyError

from .plan import AllocationPlan, Request
from .report import AllocationReport

Device = Literal["cpu", "cuda"]

_HERE = Path(__file__).parent
_HEADERS = (_HERE / "session.hpp", _HERE / "plan_core.hpp")
_REFUSALS = {
    1: "another allocator has taken the place of torch's since the first use of this one",
    2: "torch's present CPU allocator wraps its blocks",
    3: "torch's present CPU allocator has a higher priority",
}


class Adapter(Protocol):
    """How a kind of memory is planned."""

    library: ctypes.CDLL
    alignment: int

    def install(self) -> None:
        """Make requests of this thread, or of the present stream, reach the library. ConfigError if that cannot be."""

    def uninstall(self) -> None:
        """Undo ``install``; blocks stay valid."""


class CpuAdapter:
    """Requests of torch's CPU tensors, made on the thread that installs it."""

    alignment = 64

    def __init__(self) -> None:
        self.library = cpu_library()

    def install(self) -> None:
        """Put the allocator in front of torch's own."""
        if refusal := self.library.distrain_cpu_install():
            raise ConfigError("the planned allocator cannot be put in place", got=_REFUSALS[refusal])

    def uninstall(self) -> None:
        """Put torch's own back."""
        self.library.distrain_cpu_uninstall()


class CudaAdapter:
    """Requests on one CUDA device's current stream."""

    alignment = 512

    def __init__(self) -> None:
        self.library = cuda_library()
        if not self.library.distrain_cuda_is_used():
            raise ConfigError(
                "torch's CUDA allocator has not been replaced",
                hint="distrain.activation.allocator.use_on_cuda(), before anything else uses CUDA",
            )

    def install(self) -> None:
        """Follow the current stream of the current device."""
        stream = torch.cuda.current_stream()
        self.library.distrain_cuda_follow(stream.device_index, ctypes.c_void_p(stream.cuda_stream))

    def uninstall(self) -> None:
        """Nothing to do: the library passes requests on while no plan is on."""


def adapter(device: Device) -> Adapter:
    """The adapter of ``device``, built if it must be. MissingDependencyError if that is impossible."""
    return CpuAdapter() if device == "cpu" else CudaAdapter()


def use_on_cuda() -> None:
    """Let all of torch's CUDA memory pass through the planned allocator from now on.

    Before anything uses CUDA: ConfigError if it is too late. Called again, it does nothing. Without a plan, memory
    comes from the pools of CUDA (``cudaMallocAsync``); torch's own statistics and snapshots stay empty, and CUDA
    graphs cannot be captured.
    """
    library = cuda_library()
    if library.distrain_cuda_is_used():
        return
    open_cudart(library, f"libcudart.so.{(torch.version.cuda or '0').split('.')[0]}")
    plugged = torch.cuda.memory.CUDAPluggableAllocator(
        library._name, "distrain_cuda_alloc", "distrain_cuda_free"
    )
    record_stream = ctypes.cast(library.distrain_cuda_record_stream, ctypes.c_void_p).value
    plugged.allocator().set_record_stream_fn(record_stream)
    try:
        torch.cuda.memory.change_current_allocator(plugged)
    except RuntimeError as error:
        raise ConfigError(
            "torch's CUDA allocator cannot be replaced any more",
            got=str(error),
            hint="do it before any CUDA tensor",
        ) from None
    library.distrain_cuda_mark_used()


def open_cudart(library: ctypes.CDLL, path: str) -> None:
    """Let the CUDA adapter find libcudart at ``path``."""
    problem = ctypes.string_at(library.distrain_cuda_open(path.encode())).decode()
    if problem:
        raise MissingDependencyError(
            "the CUDA runtime cannot be used", got=problem, hint="install torch built for CUDA"
        )


@lru_cache(maxsize=1)
def cpu_library() -> ctypes.CDLL:
    """The CPU adapter; loaded once, and never unloaded, since tensors may hold its blocks."""
    home = Path(
        torch.__file__
    ).parent  # torch.utils.cpp_extension knows too, but needs setuptools and a second
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    torch_flags = (f"-isystem{home}/include", abi, f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-lc10")
    return _load("allocator_cpu", "cpu.cpp", ("-std=c++20", *torch_flags))


@lru_cache(maxsize=1)
def cuda_library() -> ctypes.CDLL:
    """The CUDA adapter, which needs no CUDA to be built."""
    library = _load("allocator_cuda", "cuda.cpp", ("-ldl",))
    library.distrain_cuda_open.restype = ctypes.c_void_p
    return library


def _load(name: str, source: str, flags: Sequence[str]) -> ctypes.CDLL:
    """What an earlier build has left, or else a new build."""
    sources = (_HERE / source, *_HEADERS)
    try:
        library = native.load(name, sources, build=False, flags=flags)
    except MissingDependencyError:
        library = native.load(name, sources, build=True, flags=flags)
    library.distrain_num_recorded.restype = ctypes.c_int64
    library.distrain_num_counts.restype = ctypes.c_int64
    library.distrain_num_arenas.restype = ctypes.c_int64
    if library.distrain_num_counts() != AllocationReport.num_counts():
        raise RuntimeError("the native allocator counts other things than its report")
    return library


def replay(library: ctypes.CDLL, plan: AllocationPlan) -> None:
    """Start to follow ``plan``. MemoryError if there is no room for its arena."""
    order = sorted(range(len(plan.places)), key=lambda index: plan.places[index].phase)
    places = [plan.places[index] for index in order]
    phases = np.array([each.phase for each in places], np.int32)
    sizes = np.array([each.size for each in places], np.int64)
    offsets = np.array([-1 if each.offset is None else each.offset for each in places], np.int64)
    arrays = (ctypes.c_void_p(each.ctypes.data) for each in (phases, sizes, offsets))
    numbers = (ctypes.c_int64(plan.arena_bytes), ctypes.c_int64(plan.min_bytes))
    if not library.distrain_replay(ctypes.c_int64(len(places)), *arrays, *numbers):
        raise MemoryError(f"no room for an arena of {plan.arena_bytes} bytes")


def counts(library: ctypes.CDLL) -> list[int]:
    """What has been counted since the start, of what is on or else was on last."""
    numbers = np.zeros(AllocationReport.num_counts(), np.int64)
    library.distrain_counts(ctypes.c_void_p(numbers.ctypes.data))
    return [int(each) for each in numbers]


def recorded(library: ctypes.CDLL) -> list[list[Request]]:
    """The requests recorded so far, step by step."""
    num = int(library.distrain_num_recorded())
    rows = np.zeros((num, 5), np.int64)
    library.distrain_recorded(ctypes.c_int64(num), ctypes.c_void_p(rows.ctypes.data))
    steps: list[list[Request]] = []
    for step, phase, size, born, died in rows.tolist():
        if step >= len(steps):
            steps.append([])
        steps[-1].append(Request(phase=phase, size=size, born=born, died=None if died < 0 else died))
    return steps
