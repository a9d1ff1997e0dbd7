"""What the manager does when things go differently: errors, graphs that live on, changed memory, little host memory."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distrain.activation.manager import ActivationManager
from distrain.activation.segments import TokenSegments
from distrain.core.errors import ConfigError, DistrainError
from distrain.planners.activation_plan import ActivationPlan, LayerPlan, Split, snap, uniform

NUM_TOKENS, WIDTH = 256, 16
HALF = LayerPlan.of(snap(NUM_TOKENS, swap=0.5))
PLANS = {
    "memo": HALF,
    "swap": LayerPlan.of(Split(swap=NUM_TOKENS)),
    "keep half": LayerPlan.of(snap(NUM_TOKENS, keep=0.5)),
    "recompute": uniform("recompute", num_layers=1, num_tokens=NUM_TOKENS).layers[0],
}


def plan(layer: LayerPlan = HALF, number: int = 1, host_bytes: int | None = None) -> ActivationPlan:
    return ActivationPlan(layers=(layer,) * number, host_bytes=host_bytes)


def sample() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, NUM_TOKENS, WIDTH, generator=generator).requires_grad_()


class Layer(nn.Module):
    """Does what it is told between two matrices."""

    def __init__(self, middle: Callable[[Tensor], Tensor] = torch.sin) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.middle(self.first(x)).exp())
        return result


def grads(layer: nn.Module, x: Tensor) -> list[Tensor]:
    loss = layer(x).square().mean()
    return list(torch.autograd.grad(loss, [x, *layer.parameters()]))


def assert_same(found: list[Tensor], truth: list[Tensor]) -> None:
    assert len(found) == len(truth) and all(map(torch.equal, found, truth))


# Peers' silent errors


@pytest.mark.parametrize("way", PLANS)
def test_a_tensor_and_its_transpose_are_not_taken_for_each_other(way: str) -> None:
    """Saved by the same address: an offloader that looks at nothing else gives back one for the other."""

    def middle(y: Tensor) -> Tensor:
        square = y[:, : 2 * WIDTH]
        return y.sin() * (square @ square.mT).sigmoid().mean()

    layer = Layer(middle)
    truth = grads(layer, sample())
    with ActivationManager([layer], plan(PLANS[way])):
        assert_same(grads(layer, sample()), truth)


@pytest.mark.parametrize("way", PLANS)
def test_views_at_other_offsets_and_of_other_types_of_one_memory_are_kept_apart(way: str) -> None:
    def middle(y: Tensor) -> Tensor:
        low, high = y.chunk(2, -1)
        flipped = torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * 1j).flatten(-2)
        return torch.cat([low * high, high * high.roll(1, -1)], -1) * flipped

    layer = Layer(middle)
    truth = grads(layer, sample())
    with ActivationManager([layer], plan(PLANS[way])) as manager:
        assert_same(grads(layer, sample()), truth)
    report = manager.report()
    assert report.num_units < report.num_saved, "what shares memory is stored once"


@pytest.mark.parametrize("way", PLANS)
def test_memory_that_is_freed_and_used_again_within_a_layer_is_not_mixed_up(way: str) -> None:
    """Keys by address alone would find the entry of a tensor that is gone."""

    def middle(y: Tensor) -> Tensor:
        for _ in range(6):
            y = y.sin() * y.cos()  # each step's temporaries take the place of those before
        return y

    layer = Layer(middle)
    truth = grads(layer, sample())
    with ActivationManager([layer], plan(PLANS[way])):
        assert_same(grads(layer, sample()), truth)


@pytest.mark.parametrize("way", PLANS)
def test_parameters_and_constants_are_never_packed(way: str) -> None:
    table = torch.randn(NUM_TOKENS, 2 * WIDTH)
    layer = Layer(lambda y: y * table)
    with ActivationManager([layer], plan(PLANS[way])) as manager:
        loss = layer(sample()).square().mean()
        moved = manager.report()
        loss.backward()
    packed = moved.swapped_bytes + moved.recomputed_bytes + moved.kept_bytes
    assert packed == 4 * NUM_TOKENS * (WIDTH + 2 * WIDTH), (
        "the input, and what exp returned; neither is a weight"
    )
    assert (moved.num_passed, moved.num_units) == (3, 2), "passed: both matrices, and the table"


# Changed memory


@pytest.mark.parametrize("way", PLANS)
def test_a_result_that_is_changed_in_place_is_refused_as_torch_refuses_it(way: str) -> None:
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid())
    with ActivationManager([layer], plan(PLANS[way])):
        y = layer(sample())
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_parameter_that_is_changed_before_backward_is_refused_as_torch_refuses_it() -> None:
    layer = Layer()
    with ActivationManager([layer], plan()):
        loss = layer(sample()).sum()
        with torch.no_grad():
            layer.second.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# Graphs


@pytest.mark.parametrize("way", PLANS)
def test_backward_may_run_twice_over_a_retained_graph(way: str) -> None:
    layer, x = Layer(), sample()
    truth = grads(layer, x)
    with ActivationManager([layer], plan(PLANS[way])) as manager:
        loss = layer(x).square().mean()
        for retain in (True, False):
            assert_same(list(torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=retain)), truth)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        assert manager.report().host_bytes == 0


def second_order(layer: nn.Module) -> list[Tensor]:
    x = sample()
    (first,) = torch.autograd.grad(layer(x).square().mean(), [x], create_graph=True)
    return list(torch.autograd.grad(first.square().sum(), [x, *layer.parameters()], allow_unused=True))[:4]


@pytest.mark.parametrize("way", PLANS)
def test_a_gradient_of_a_gradient_is_right(way: str) -> None:
    layer = Layer()
    truth = second_order(layer)
    with ActivationManager([layer], plan(PLANS[way])) as manager:
        assert_same(second_order(layer), truth)
        assert manager.report().host_bytes == 0


def test_without_gradients_nothing_is_done() -> None:
    layer = Layer()
    with ActivationManager([layer], plan()) as manager, torch.no_grad():
        layer(sample())
    assert manager.report().num_layers == 0


def test_several_passes_may_be_in_flight_in_any_order() -> None:
    layers = nn.ModuleList([Layer() for _ in range(3)])
    inputs = [sample().detach() * (1 + i) for i in range(3)]

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x.square().mean()

    def run() -> list[Tensor]:
        layers.zero_grad()
        losses = [forward(x) for x in inputs]
        for i in (1, 2, 0):
            losses[i].backward()
        return [parameter.grad for parameter in layers.parameters() if parameter.grad is not None]

    truth = run()
    with ActivationManager(layers, plan(number=3)) as manager:
        assert_same(run(), truth)
        assert manager.report().host_bytes == 0


def test_a_graph_that_is_dropped_gives_its_host_memory_back() -> None:
    layer = Layer()
    with ActivationManager([layer], plan()) as manager:
        loss = layer(sample()).sum()
        assert manager.report().host_bytes > 0
        del loss
        assert manager.report().host_bytes == 0


def test_a_checkpoint_inside_a_layer_keeps_its_own_recomputation() -> None:
    class Checkpointed(Layer):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).tanh()
            result: Tensor = checkpoint(lambda y: self.second(y.exp().sin()), hidden, use_reentrant=False)
            return result * x

    layer = Checkpointed()
    truth = grads(layer, sample())
    for way in PLANS.values():
        with ActivationManager([layer], plan(way)) as manager:
            assert_same(grads(layer, sample()), truth)
            assert manager.report().host_bytes == 0


def test_a_checkpoint_around_a_layer_gives_the_same_gradients() -> None:
    layer = Layer()
    truth = grads(layer, sample())
    with ActivationManager([layer], plan()):
        loss = checkpoint(layer, (x := sample()), use_reentrant=False).square().mean()
        assert_same(list(torch.autograd.grad(loss, [x, *layer.parameters()])), truth)


# Errors


class Fails(Layer):
    """Raises in forward or in backward, when told."""

    where = ""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).exp()
        if self.where == "forward":
            raise ArithmeticError("forward failed")
        if self.where == "backward":
            y.register_hook(_fail)
        result: Tensor = self.second(y)
        return result


def _fail(_: Tensor) -> None:
    raise ArithmeticError("backward failed")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_exception_the_next_step_is_right_and_nothing_is_held(where: str) -> None:
    layers = nn.ModuleList([Layer(), Fails()])
    model = nn.Sequential(*layers)
    truth = grads(model, sample())
    with ActivationManager(layers, plan(number=2)) as manager:
        layers[1].where = where  # type: ignore[assignment]
        with pytest.raises(ArithmeticError, match=f"{where} failed"):
            grads(model, sample())
        layers[1].where = ""  # type: ignore[assignment]
        gc.collect()  # the traceback held the graph
        assert manager.report().host_bytes == 0
        assert_same(grads(model, sample()), truth)
    assert_same(grads(model, sample()), truth)


def test_leaving_the_block_leaves_the_layers_as_they_were() -> None:
    layer = Layer()
    before = (len(layer._forward_pre_hooks), len(layer._forward_hooks))
    manager = ActivationManager([layer], plan(), segments=TokenSegments(core=["second"]))
    with manager:
        with pytest.raises(DistrainError, match="at work already"):
            manager.__enter__()
        loss = layer(sample()).sum()
    assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == before
    assert not layer.second._forward_hooks
    loss.backward()
    assert manager.report().host_bytes == 0


def test_a_manager_keeps_no_graph_alive() -> None:
    layer = Layer()
    with ActivationManager([layer], plan()):
        result = layer(sample())
        node: Any = weakref.ref(result)
        del result
        assert node() is None


def test_host_memory_stays_below_its_limit_and_what_does_not_fit_stays_on_the_device() -> None:
    layers = nn.ModuleList([Layer() for _ in range(4)])
    model = nn.Sequential(*layers)
    truth = grads(model, sample())
    limit = 60_000
    with ActivationManager(layers, plan(PLANS["swap"], 4, host_bytes=limit)) as manager:
        assert_same(grads(model, sample()), truth)
    report = manager.report()
    assert 0 < report.host_peak_bytes <= report.host_reserved_bytes <= limit
    assert report.num_refused > 0 and report.kept_bytes > 0


def test_impossible_plans_are_refused_with_every_problem() -> None:
    with pytest.raises(ConfigError) as refused:
        plan(
            LayerPlan(
                input=Split(recompute=256),
                attention=Split(swap=256),
                before_attention=Split(swap=100, recompute=156),
                after_attention=Split(keep=128, swap=128),
            )
        )
    assert len(refused.value.problems) == 2
    with pytest.raises(ConfigError, match="another number of layers"):
        ActivationManager([Layer()], plan(number=2))
    with pytest.raises(ConfigError, match="no such submodule") as refused:
        ActivationManager([Layer()], plan(), segments=TokenSegments(core=["first_"]))
    assert "first" in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        ActivationManager(
            [Layer(), *map(nn.Sequential, (Fails(), Fails()))],
            plan(number=3),
            segments=TokenSegments(core=["first"]),
        )
    assert [problem.got for problem in refused.value.problems] == ["first"], "of two layers the same, once"
