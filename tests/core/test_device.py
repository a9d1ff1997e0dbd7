"""The device seam: one test for CPU and GPU wherever both must behave the same."""

import mmap
import time

import pytest
import torch

from distrain.core.device import CpuDevice, Device, known_device, measured_flops, open_device
from distrain.core.errors import ConfigError

MIB = 1024**2
GIB = 1024**3


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    return open_device(request.param)


def test_a_copy_on_a_side_stream_is_ordered_by_events(device: Device) -> None:
    side, done = device.stream(), device.event(timing=True)
    source = torch.arange(MIB, dtype=torch.float32, device=device.torch_device)
    host = device.pinned(MIB, dtype=torch.float32)
    side.wait_stream(device.current_stream())
    with device.use(side):
        start = device.event(timing=True)
        start.record(side)
        host.copy_(source, non_blocking=True)
        done.record(side)
    device.current_stream().wait_event(done)
    done.synchronize()
    assert done.query()
    assert torch.equal(host, torch.arange(MIB, dtype=torch.float32))
    assert start.elapsed_time(done) >= 0
    side.synchronize()
    device.synchronize()


def test_events_measure_milliseconds_and_must_be_recorded_first(device: Device) -> None:
    start, end = device.event(timing=True), device.event(timing=True)
    with pytest.raises((RuntimeError, ValueError)):
        start.elapsed_time(end)
    before = time.perf_counter()
    start.record()
    time.sleep(0.004)
    end.record()
    device.synchronize()
    assert 2 <= start.elapsed_time(end) <= (time.perf_counter() - before) * 1000


def test_pinned_memory_has_the_shape_asked_for_and_is_pinned_where_it_matters(device: Device) -> None:
    memory = device.pinned(3, 4, dtype=torch.bfloat16)
    assert (memory.shape, memory.dtype, memory.device.type) == ((3, 4), torch.bfloat16, "cpu")
    assert memory.is_pinned() == (device.torch_device.type == "cuda")


def filled_pages(num_bytes: int) -> mmap.mmap:
    """Memory straight from the system: malloc may have as much that is free and in RAM already."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.write(b"1" * num_bytes)
    return pages


def test_the_peak_of_memory_follows_an_allocation(device: Device) -> None:
    device.reset_peak_memory()
    before = device.peak_memory_bytes()
    if device.torch_device.type == "cpu":
        block: object = filled_pages(64 * MIB)
    else:
        block = torch.ones(64 * MIB, dtype=torch.uint8, device=device.torch_device)
    device.synchronize()
    del block
    assert device.peak_memory_bytes() >= before + 48 * MIB
    assert device.peak_memory_bytes() < device.memory_bytes()


def test_a_seed_repeats_what_is_drawn(device: Device) -> None:
    device.seed(7)
    first = torch.rand(8, device=device.torch_device)
    device.seed(7)
    assert torch.equal(first, torch.rand(8, device=device.torch_device))
    device.seed(8)
    assert not torch.equal(first, torch.rand(8, device=device.torch_device))


def test_the_spec_says_what_the_device_can_do(device: Device) -> None:
    spec = device.spec()
    assert spec.memory_bytes == device.memory_bytes() > 64 * MIB
    assert spec.peak_flops > 1e8
    assert spec.name


def test_a_matrix_product_is_measured_in_flops(device: Device) -> None:
    size = 256
    flops = measured_flops(device, dtype=torch.float32, size=size, budget_s=0.01)
    assert 1e6 < flops < 1e16


def test_each_device_names_its_process_group_backend(device: Device) -> None:
    assert device.backend == {"cpu": "gloo", "cuda": "nccl"}[device.torch_device.type]


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [
        ("Tesla V100-SXM2-32GB", 32, "v100-32g"),
        ("NVIDIA A100-SXM4-40GB", 39.6, "a100-40g"),
        ("NVIDIA A100 80GB PCIe", 79.3, "a100-80g"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-80g"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100-80g"),
        ("NVIDIA H200", 139.8, "h200-141g"),
        ("NVIDIA B200", 178, "b200-180g"),
        ("NVIDIA GeForce RTX 4090", 24, None),
        ("NVIDIA GH200 480GB", 94, None),
    ],
)
def test_a_drivers_name_finds_its_datasheet(name: str, gib: float, expected: str | None) -> None:
    memory_bytes = int(gib * GIB)
    spec = known_device(name, memory_bytes=memory_bytes)
    assert (spec.name if spec else None) == expected
    assert spec is None or spec.memory_bytes == memory_bytes


def test_cpu_can_always_be_asked_for_and_auto_takes_what_is_there() -> None:
    assert isinstance(open_device("cpu", local_rank=99), CpuDevice)
    assert open_device("auto").torch_device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_rank_without_a_gpu_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="no GPU for this rank"):
        open_device("cuda", local_rank=torch.cuda.device_count())
