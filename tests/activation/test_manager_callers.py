"""How layers are called: with other weights, from several threads, compiled."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.activation.manager import ActivationManager
from distrain.core.errors import DistrainError
from distrain.planners.activation_plan import ActivationPlan
from helpers.layer_plans import NUM_TOKENS, WAYS

WIDTH = 16


class Layer(nn.Module):
    """Two matrices, and between them what somebody wants to happen there."""

    def __init__(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.meanwhile = meanwhile

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).sin()
        self.meanwhile()
        result: Tensor = self.second(y.exp())
        return result


def sample() -> Tensor:
    return torch.randn(1, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()


def plan(way: str, number: int = 1) -> ActivationPlan:
    return ActivationPlan(layers=(WAYS[way],) * number)


def grads(layer: nn.Module, before_backward: Callable[[], Any] = lambda: None) -> list[Tensor]:
    x, parameters = sample(), list(layer.parameters())
    loss = layer(x).square().mean()
    before_backward()
    return list(torch.autograd.grad(loss, [x, *parameters]))


def assert_same(found: list[Tensor], truth: list[Tensor]) -> None:
    assert len(found) == len(truth) and all(map(torch.equal, found, truth))


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_lent_to_a_layer_for_one_call_are_those_of_its_backward(way: str) -> None:
    layer = Layer()

    def lent() -> list[Tensor]:
        weights = {name: (2 * each.detach()).requires_grad_() for name, each in layer.named_parameters()}
        x = sample()
        y = torch.func.functional_call(layer, weights, (x,))
        return list(torch.autograd.grad(y.square().mean(), [x, *weights.values()]))

    truth = lent()
    with ActivationManager([layer], plan(way)):
        assert_same(lent(), truth)


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_replaced_before_backward_still_counts_as_it_was(way: str) -> None:
    def replace() -> None:
        layer.first.bias = nn.Parameter(torch.ones(2 * WIDTH))

    truth = grads(Layer())
    layer = Layer()
    with ActivationManager([layer], plan(way)):
        assert_same(grads(layer, replace), truth)


@pytest.mark.parametrize("way", ["memo", "all again"])
def test_a_weight_that_is_put_in_other_memory_before_backward_is_refused(way: str) -> None:
    def move() -> None:
        layer.first.bias.data = torch.ones(2 * WIDTH)

    layer = Layer()
    with (
        ActivationManager([layer], plan(way)),
        pytest.raises(RuntimeError, match="was given other memory"),
    ):
        grads(layer, move)


def test_two_threads_in_the_layers_of_one_manager_are_refused_and_do_no_harm() -> None:
    refused: list[BaseException] = []

    def other_thread() -> None:
        try:
            layers[0](sample())
        except DistrainError as error:
            refused.append(error)

    def start_another() -> None:
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()

    truth = grads(Layer())
    layers = nn.ModuleList([Layer(), Layer(start_another)])
    with ActivationManager(layers, plan("memo", 2)) as manager:
        assert_same(grads(layers[1]), truth)
        assert len(refused) == 1 and "two threads" in str(refused[0])
        assert_same(grads(layers[0]), truth)
    assert manager.report().host_bytes == 0


@pytest.fixture
def compiler() -> Iterator[Any]:
    import torch._dynamo

    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_layer_is_managed_as_what_was_compiled(compiler: Any, way: str) -> None:
    truth = grads(Layer())
    layer = Layer()
    layer.compile(backend="aot_eager")
    with ActivationManager([layer], plan(way)) as manager:
        for _ in range(2):
            assert_same(grads(layer), truth)
        report = manager.report()
    assert (report.recomputed_bytes > 0) == (way != "swap")
