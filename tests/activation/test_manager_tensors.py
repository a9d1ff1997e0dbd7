"""Tensors that are more than their memory: conjugates, negatives, wrappers, nested ones."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

from distrain.activation.manager import ActivationManager
from distrain.planners.activation_plan import ActivationPlan
from helpers.layer_plans import NUM_TOKENS, WAYS

WIDTH = 16


class Layer(nn.Module):
    """Does what it is told between two matrices."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.middle(self.first(x)))
        return result


def grads(layer: nn.Module) -> list[Tensor]:
    x = torch.randn(1, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
    return list(torch.autograd.grad(layer(x).square().mean(), [x, *layer.parameters()]))


def managed(layer: nn.Module, way: str) -> list[Tensor]:
    with ActivationManager([layer], ActivationPlan(layers=(WAYS[way],))) as manager:
        found = grads(layer)
    assert manager.report().host_bytes == 0
    return found


def as_complex(y: Tensor) -> Tensor:
    return torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())


def turned_back(y: Tensor) -> Tensor:
    angles = torch.arange(NUM_TOKENS * WIDTH // 2).reshape(NUM_TOKENS, -1) * 0.01
    z = (as_complex(y) * torch.polar(torch.ones_like(angles), angles)).conj()
    return torch.view_as_real((z * z.exp()).resolve_conj()).flatten(-2)


def imaginary(y: Tensor) -> Tensor:
    part = as_complex(y).conj().imag
    assert part.is_neg()
    return torch.cat([part * part.sin(), part.exp()], -1)


def nested(y: Tensor) -> Tensor:
    parts = torch._nested_view_from_buffer(
        y.flatten(), torch.tensor([[100, WIDTH], [156, WIDTH]]),
        torch.tensor([[WIDTH, 1], [WIDTH, 1]]), torch.tensor([0, 100 * WIDTH]),
    )  # fmt: skip
    return torch.cat(list(parts.sin().unbind()))[None]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("middle", [turned_back, imaginary, nested])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_same_to_the_bit(middle: Callable[[Tensor], Tensor], way: str) -> None:
    layer = Layer(middle)
    found, truth = managed(layer, way), grads(layer)
    assert len(found) == len(truth) and all(map(torch.equal, found, truth))


def wrapped(y: Tensor, mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(y, mesh, [Replicate()], run_check=False)


def plain(y: Tensor) -> Tensor:
    assert isinstance(y, DTensor)
    return y.to_local()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapper_that_is_changed_in_place_is_refused_as_torch_refuses_it(
    mesh: DeviceMesh, way: str
) -> None:
    def changed(y: Tensor) -> Tensor:
        result = wrapped(y, mesh).exp()  # backward needs the result
        result.add_(1.0)
        return plain(result)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(Layer(changed))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        managed(Layer(changed), way)


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapper_that_is_changed_in_place_where_nobody_minds_is_followed(
    mesh: DeviceMesh, way: str
) -> None:
    def changed(y: Tensor) -> Tensor:
        inner = wrapped(y, mesh).sin()
        result = inner.exp()
        inner.add_(1.0)
        return plain(result.sin() * inner)

    layer = Layer(changed)
    assert all(map(torch.equal, managed(layer, way), grads(layer)))
