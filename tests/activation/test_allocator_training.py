"""Training under a plan: bit for bit as without, large tensors in the arena, and safe when a step leaves the plan."""

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distrain.activation.allocator import AllocationPlan, PlannedAllocator, bind
from distrain.core.errors import MissingDependencyError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

WIDTH, LENGTH = 64, 96


class Layer(nn.Module):
    """A transformer layer, recomputed in the backward if told so."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute:
            return checkpoint(self.layer, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self.layer(x)

    def layer(self, x: Tensor) -> Tensor:
        split = (1, x.shape[1], 4, WIDTH // 4)
        q, k, v = (part.view(split).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))  # type: ignore[no-any-return]


class Job:
    """A model of six layers under AdamW; ``step`` returns the loss."""

    def __init__(self, *, recompute: bool = False) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(*(Layer(recompute=recompute) for _ in range(6)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.data = torch.randn(4 * LENGTH, WIDTH)
        self.step()  # makes the optimizer's state

    def step(self, *, length: int = LENGTH, between: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        self.optimizer.zero_grad()
        x = self.data[:length].unsqueeze(0)
        for index, layer in enumerate(self.model):
            x = layer(x)
            if index == 2:
                x = between(x)
        loss = (x**2).mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> list[Tensor]:
        """Copies of parameters and gradients."""
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        return [each.detach().clone() for each in (*self.model.parameters(), *gradients)]


@pytest.fixture(scope="module", params=[False, True], ids=["kept", "recomputed"])
def recompute(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def plan(recompute: bool) -> AllocationPlan:
    return planned(Job(recompute=recompute))


@pytest.fixture(autouse=True)
def _nothing_is_on() -> Iterator[None]:
    yield
    before = bind.cpu_library().distrain_num_arenas()
    tensor = torch.empty(2**16)
    assert bind.cpu_library().distrain_num_arenas() == before
    del tensor


def planned(job: Job) -> AllocationPlan:
    with PlannedAllocator.record() as recording:
        for _ in range(2):
            job.step()
            recording.new_step()
    return recording.plan()


def both(
    recompute: bool, plan: AllocationPlan, steps: list[Callable[[Job], Tensor]]
) -> tuple[list[Tensor], list[Tensor], PlannedAllocator]:
    """Losses and final state of the steps without a plan, the same with it, and the allocator afterwards."""
    results = []
    plain, under_plan = Job(recompute=recompute), Job(recompute=recompute)
    torch.manual_seed(5)
    losses = [step(plain) for step in steps]
    results.append(losses + plain.state())
    torch.manual_seed(5)
    with PlannedAllocator(plan) as allocator:
        losses = []
        for step in steps:
            losses.append(step(under_plan).clone())
            allocator.new_step()
    results.append(losses + under_plan.state())
    return results[0], results[1], allocator


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def test_five_steps_of_adamw_are_bit_equal_and_live_in_the_arena(
    recompute: bool, plan: AllocationPlan
) -> None:
    without, under, allocator = both(recompute, plan, [Job.step] * 5)
    assert equal(without, under)
    report = allocator.report()
    assert len(plan.places) > 150
    assert report.hits == 5 * len(plan.places)
    assert (report.unplanned, report.skipped, report.occupied, report.resyncs) == (0, 0, 0, 0)
    assert report.steps == 5
    assert report.top_bytes == plan.arena_bytes == plan.lower_bound_bytes


def test_the_measured_peak_is_the_planned_one(recompute: bool, plan: AllocationPlan) -> None:
    job = Job(recompute=recompute)
    with PlannedAllocator.record() as recording:
        job.step()
        recording.new_step()
        job.step()
    with PlannedAllocator(plan) as allocator:
        job.step()
        allocator.new_step()
        job.step()
        report = allocator.report()
    assert report.hit_rate == 1.0
    assert report.fallback_peak_bytes == 0
    assert report.peak_bytes == plan.arena_bytes
    assert report.peak_live_bytes == recording.peak_bytes <= plan.arena_bytes


def test_a_step_of_another_length_is_right_and_the_next_one_follows_the_plan_again(
    recompute: bool, plan: AllocationPlan
) -> None:
    steps = [Job.step, lambda job: job.step(length=LENGTH + 32), lambda job: job.step(length=16), Job.step]
    without, under, allocator = both(recompute, plan, [*steps, Job.step])
    assert equal(without, under)
    report = allocator.report()
    assert report.extra > 100
    assert report.skipped > 100
    assert report.hits >= 2.5 * len(plan.places)


def test_an_extra_tensor_costs_only_itself(recompute: bool, plan: AllocationPlan) -> None:
    kept = []

    def extra(x: Tensor) -> Tensor:
        kept.append(torch.full((LENGTH + 1, WIDTH), 7.0))
        return x

    job = Job(recompute=recompute)
    with PlannedAllocator(plan) as allocator:
        job.step(between=extra)
        allocator.new_step()
        job.step()
        report = allocator.report()
    assert report.hits == 2 * len(plan.places)
    assert (report.extra, report.occupied, report.skipped) == (1, 0, 0)
    assert bool((kept[0] == 7.0).all())


def test_an_extra_tensor_that_looks_like_a_planned_one_is_right_and_does_not_spoil_the_rest(
    recompute: bool, plan: AllocationPlan
) -> None:
    kept = []

    def extra(x: Tensor) -> Tensor:
        kept.append(x.detach() + 1)
        return x

    without, under, allocator = both(
        recompute, plan, [Job.step, lambda job: job.step(between=extra), Job.step]
    )
    assert equal(without, under)
    assert torch.equal(kept[0], kept[1])
    report = allocator.report()
    assert report.hits >= 0.9 * 3 * len(plan.places)


def test_a_layer_less_is_right_and_the_plan_is_found_again(recompute: bool, plan: AllocationPlan) -> None:
    def shortened(job: Job) -> Tensor:
        job.optimizer.zero_grad()
        x = job.data[:LENGTH].unsqueeze(0)
        for index, layer in enumerate(job.model):
            x = layer(x) if index != 3 else x
        loss = (x**2).mean()
        loss.backward()
        job.optimizer.step()
        return loss.detach()

    without, under, allocator = both(recompute, plan, [Job.step, shortened, Job.step])
    assert equal(without, under)
    report = allocator.report()
    assert report.resyncs >= 1
    assert report.hits >= 0.8 * 3 * len(plan.places)


def test_an_exception_in_a_step_leaves_everything_in_order(recompute: bool, plan: AllocationPlan) -> None:
    def failing(job: Job) -> Tensor:
        def fail(x: Tensor) -> Tensor:
            raise ArithmeticError("in the middle")

        with pytest.raises(ArithmeticError):
            job.step(between=fail)
        return job.step()

    without, under, allocator = both(recompute, plan, [failing, Job.step, Job.step])
    assert equal(without, under)
    assert allocator.report().hits >= 2 * len(plan.places)
    with pytest.raises(ArithmeticError), PlannedAllocator(plan) as allocator:
        raise ArithmeticError("out of the context")
    tensor = torch.empty(2**16)
    assert allocator.report().hits == 0
    del tensor


def test_tensors_outlive_the_context_and_the_arena_its_last_tensor() -> None:
    gc.collect()  # of the tests before
    num_before = bind.cpu_library().distrain_num_arenas()
    job = Job()
    with PlannedAllocator(planned(job)) as allocator:
        loss = job.step()
        state = job.state()
        report = allocator.report()
    assert report.live_blocks > 0
    gradients = [each.grad for each in job.model.parameters() if each.grad is not None]
    assert equal([*job.model.parameters(), *gradients], state)
    large = max(gradients, key=lambda each: each.numel())
    address = large.data_ptr()
    assert is_mapped(address)
    job.optimizer.zero_grad()
    assert is_mapped(address)  # `large` is in it
    del gradients, large, loss, state
    assert bind.cpu_library().distrain_num_arenas() == num_before
    job.step()


def is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def test_a_tensor_of_the_context_can_grow_after_it() -> None:
    with PlannedAllocator(planned(Job())):
        tensor = torch.arange(4096.0)
    tensor.resize_(2**16)
    assert torch.equal(tensor[:4096], torch.arange(4096.0))


def test_without_a_compiler_it_says_so_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTRAIN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    plan = AllocationPlan(places=(), arena_bytes=0, lower_bound_bytes=0, min_bytes=1, alignment=64)
    bind.cpu_library.cache_clear()
    try:
        first, second = Job(), Job()
        torch.manual_seed(5)
        loss = first.step()
        torch.manual_seed(5)
        with pytest.raises(MissingDependencyError, match="compiler"), PlannedAllocator(plan):
            pass
        assert torch.equal(loss, second.step())
    finally:
        bind.cpu_library.cache_clear()
