"""The CUDA adapter's logic over a runtime library of our own: streams, devices, pools, errors, and the plan."""

import ctypes
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distrain.activation.allocator import AllocationPlan, AllocationReport, PlannedAllocator, bind
from distrain.activation.allocator.plan import one_step, plan_requests
from distrain.core import native
from distrain.core.errors import ConfigError, MissingDependencyError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

COMPUTE, COPIES = 7, 8  # streams


@dataclass
class Cuda:
    """The adapter as torch would call it, and the runtime beneath."""

    library: ctypes.CDLL
    runtime: ctypes.CDLL
    live: dict[int, tuple[int, int, int]] = field(default_factory=dict)

    def alloc(self, size: int, *, stream: int = COMPUTE, device: int = 0) -> int:
        """The address of a new block, 0 if none was given."""
        block = self.runtime.fake_alloc(
            self.library.distrain_cuda_alloc, ctypes.c_ssize_t(size), device, ctypes.c_void_p(stream)
        )
        if block:
            self.live[block] = (size, device, stream)
        return block or 0

    def free(self, block: int) -> None:
        size, device, stream = self.live.pop(block)
        self.library.distrain_cuda_free(
            ctypes.c_void_p(block), ctypes.c_ssize_t(size), device, ctypes.c_void_p(stream)
        )

    def log(self) -> list[str]:
        """What the runtime was asked since the last look."""
        lines = ctypes.string_at(self.runtime.fake_log()).decode().splitlines()
        self.runtime.fake_reset(ctypes.c_int64(2**62), 1)
        return lines

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.library.distrain_cuda_follow(0, ctypes.c_void_p(COMPUTE))
        self.library.distrain_record(ctypes.c_int64(1024))
        yield
        self.library.distrain_stop()

    def plan(self) -> AllocationPlan:
        return plan_requests(one_step(bind.recorded(self.library)), min_bytes=1024, alignment=512)

    @contextmanager
    def planned(self, plan: AllocationPlan) -> Iterator[None]:
        self.library.distrain_cuda_follow(0, ctypes.c_void_p(COMPUTE))
        bind.replay(self.library, plan)
        try:
            yield
        finally:
            self.library.distrain_stop()

    def report(self) -> AllocationReport:
        return AllocationReport.of(bind.counts(self.library))


@pytest.fixture(scope="module")
def opened() -> Cuda:
    source = Path(__file__).parent / "fake_cudart.cpp"
    runtime = native.load("fake_cudart", [source], build=True)
    for name in ("fake_alloc", "fake_log", "fake_thrown"):
        getattr(runtime, name).restype = ctypes.c_void_p
    runtime.fake_used.restype = ctypes.c_int64
    library = bind.cuda_library()
    with pytest.raises(ConfigError, match="has not been replaced"), PlannedAllocator.record(device="cuda"):
        pass
    bind.open_cudart(library, runtime._name)
    return Cuda(library, runtime)


@pytest.fixture
def cuda(opened: Cuda) -> Iterator[Cuda]:
    opened.runtime.fake_reset(ctypes.c_int64(2**62), 1)
    yield opened
    for block in list(opened.live):
        opened.free(block)
    assert opened.runtime.fake_used() == 0
    assert opened.library.distrain_num_arenas() == 0


def step(cuda: Cuda) -> list[int]:
    """Three blocks, of which the last takes the first one's place; returns the addresses."""
    first, second = cuda.alloc(4096), cuda.alloc(2048)
    cuda.free(first)
    third = cuda.alloc(4096)
    for block in (second, third):
        cuda.free(block)
    return [first, second, third]


def plan_of_a_step(cuda: Cuda) -> AllocationPlan:
    with cuda.recording():
        step(cuda)
    return cuda.plan()


def test_a_step_on_the_compute_stream_lives_in_one_arena(cuda: Cuda) -> None:
    plan = plan_of_a_step(cuda)
    assert plan.arena_bytes == 4096 + 2048
    cuda.log()
    with cuda.planned(plan):
        first, second, third = step(cuda)
        assert first == third != second
        cuda.library.distrain_new_step()
        assert step(cuda) == [first, second, third]
        assert (cuda.report().hits, cuda.report().misses) == (6, 0)
    # The arena's room is made and taken, and nothing else is asked for.
    assert cuda.log() == ["synchronize 0 0", "trim 1 0", "malloc 6144 0", "free 0 0"]


def test_other_streams_and_devices_and_small_blocks_go_to_the_pools(cuda: Cuda) -> None:
    plan = plan_of_a_step(cuda)
    with cuda.planned(plan):
        cuda.log()
        cuda.alloc(4096, stream=COPIES)
        cuda.alloc(4096, device=1)
        cuda.alloc(100)
        report = cuda.report()
        assert (report.hits, report.elsewhere, report.extra) == (0, 2, 0)
        log = [line for line in cuda.log() if not line.startswith("keep")]
        assert log == [
            f"mallocAsync 4096 {COPIES}",
            f"mallocAsync 4096 {COMPUTE}",
            f"mallocAsync 100 {COMPUTE}",
        ]
        for block, (_, device, stream) in list(cuda.live.items()):
            cuda.free(block)
            assert cuda.log() == [f"freeAsync {stream} {device}"]
        step(cuda)
        assert cuda.report().hits == 3


def test_what_another_stream_has_read_waits_for_it_before_its_address_is_used_again(cuda: Cuda) -> None:
    plan = plan_of_a_step(cuda)
    with cuda.planned(plan):
        cuda.log()
        block, other = cuda.alloc(4096), cuda.alloc(2048)
        for _ in range(2):
            cuda.library.distrain_cuda_record_stream(ctypes.c_void_p(block), ctypes.c_void_p(COPIES))
        cuda.library.distrain_cuda_record_stream(ctypes.c_void_p(block), ctypes.c_void_p(COMPUTE))
        cuda.free(other)
        assert cuda.log() == []
        cuda.free(block)
        assert cuda.log() == [f"record {COPIES} 0", f"wait {COMPUTE} 0"]
        assert cuda.alloc(4096) == block
        cuda.free(block)
        assert cuda.log() == []
    pooled = cuda.alloc(4096)
    cuda.library.distrain_cuda_record_stream(ctypes.c_void_p(pooled), ctypes.c_void_p(COPIES))
    cuda.log()
    cuda.free(pooled)
    assert cuda.log() == [f"record {COPIES} 0", f"wait {COMPUTE} 0", f"freeAsync {COMPUTE} 0"]


def test_devices_keep_what_their_pools_get_back_and_do_without_pools_where_there_are_none(cuda: Cuda) -> None:
    cuda.log()
    cuda.alloc(100, device=2)
    assert cuda.log()[0] == "keep 3 0"
    cuda.alloc(100, device=2)
    assert cuda.log() == [f"mallocAsync 100 {COMPUTE}"]
    cuda.runtime.fake_reset(ctypes.c_int64(2**62), 0)
    block = cuda.alloc(100, device=3)
    cuda.free(block)
    assert cuda.log() == ["malloc 100 3", "free 0 0"]


def test_no_memory_is_an_error_that_torch_can_raise_and_nothing_at_all_is_no_block(cuda: Cuda) -> None:
    assert cuda.alloc(0) == 0
    plan = plan_of_a_step(cuda)
    cuda.runtime.fake_reset(ctypes.c_int64(5000), 1)
    with pytest.raises(MemoryError, match="arena of 6144 bytes"):
        bind.replay(cuda.library, plan)
    assert cuda.alloc(6000) == 0
    assert "no 6000 bytes on device 0: out of memory" in ctypes.string_at(cuda.runtime.fake_thrown()).decode()
    assert cuda.runtime.fake_error() == 0  # not left for the next call
    assert cuda.alloc(4000) != 0


def test_blocks_outlive_the_plan(cuda: Cuda) -> None:
    plan = plan_of_a_step(cuda)
    with cuda.planned(plan):
        block = cuda.alloc(4096)
    ctypes.memset(block, 1, 4096)
    cuda.log()
    cuda.free(block)
    assert cuda.log() == ["free 0 0"]


def test_steps_that_leave_the_plan_hurt_no_block(cuda: Cuda) -> None:
    """Random programs straight through the C interface; each block holds its own byte."""
    for seed in range(40):
        drawn = random.Random(seed)
        sizes = [1024, 1500, 4096, 10_000]
        script = [drawn.choice(sizes) if drawn.random() < 0.6 else None for _ in range(60)]
        with cuda.recording():
            run(cuda, script, drawn)
        with cuda.planned(cuda.plan()):
            for _ in range(3):
                changed = [drawn.choice(sizes) if drawn.random() < 0.1 else each for each in script]
                changed = [each for each in changed if drawn.random() > 0.05]
                run(cuda, changed, random.Random(seed) if drawn.random() < 0.5 else drawn)
                cuda.library.distrain_new_step()
            assert cuda.report().hits > 0


def run(cuda: Cuda, script: list[int | None], drawn: random.Random) -> None:
    held: dict[int, bytes] = {}
    for number, size in enumerate(script):
        if size is not None:
            block = cuda.alloc(size, stream=COPIES if drawn.random() < 0.05 else COMPUTE)
            held[block] = bytes([number]) * size
            ctypes.memmove(block, held[block], size)
        elif held:
            block = drawn.choice(list(held))
            assert ctypes.string_at(block, len(held[block])) == held.pop(block)
            cuda.free(block)
    for block, content in held.items():
        assert ctypes.string_at(block, len(content)) == content
        cuda.free(block)


def test_a_runtime_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    library = ctypes.CDLL(str(shutil.copy(bind.cuda_library()._name, tmp_path / "another.so")))
    library.distrain_cuda_open.restype = ctypes.c_void_p
    with pytest.raises(MissingDependencyError, match="cannot be used") as caught:
        bind.open_cudart(library, str(tmp_path / "libcudart.so.0"))
    assert "libcudart.so.0" in str(caught.value)
    source = tmp_path / "empty.cpp"
    source.write_text('extern "C" int cudaMalloc() { return 0; }\n')
    empty = native.load("empty_cudart", [source], build=True)
    with pytest.raises(MissingDependencyError) as caught:
        bind.open_cudart(library, empty._name)
    assert "lacks cudaFree, lacks cudaMallocAsync" in str(caught.value)
    assert not library.distrain_cuda_is_used()


ON_A_GPU = """
import torch
from distrain.activation.allocator import PlannedAllocator, use_on_cuda
use_on_cuda()

def job():
    torch.manual_seed(3)
    layer = torch.nn.TransformerEncoderLayer(256, 4, dropout=0.0, batch_first=True, device="cuda")
    return layer, torch.optim.AdamW(layer.parameters()), torch.randn(4, 512, 256, device="cuda")

def step(layer, optimizer, x):
    optimizer.zero_grad()
    loss = layer(layer(x)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()

torch.use_deterministic_algorithms(True)
plain, under = job(), job()
losses = [step(*plain) for _ in range(7)]
theirs = [step(*under) for _ in range(2)]
with PlannedAllocator.record(device="cuda") as recording:
    for _ in range(2):
        theirs.append(step(*under).clone())
        recording.new_step()
with PlannedAllocator(recording.plan(), device="cuda") as allocator:
    for _ in range(3):
        theirs.append(step(*under).clone())
        allocator.new_step()
    report = allocator.report()
assert torch.equal(torch.stack(losses), torch.stack(theirs))
assert all(map(torch.equal, plain[0].parameters(), under[0].parameters()))
assert report.hit_rate > 0.95, report
assert report.top_bytes <= report.arena_bytes
"""


@pytest.mark.gpu
def test_on_a_gpu_training_is_bit_equal_in_the_arena() -> None:
    """In a process of its own, since torch's allocator is replaced for good."""
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    subprocess.run([sys.executable, "-c", ON_A_GPU], check=True, timeout=150, env=environment)
