"""The backward in two halves leaves the same gradients as the backward in one."""

import pytest
import torch
from torch import Tensor, nn

from distrain.parallel.deferred import Linear, Splitter, second_half


class Net(nn.Module):
    """Linear layers, one of them used twice, and a norm between them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Linear(8, 16, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(16, dtype=dtype)
        self.twice = Linear(16, 16, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 8] -> [..., 16]."""
        hidden: Tensor = self.norm(self.first(x))
        for _ in range(2):
            hidden = self.twice(torch.tanh(hidden))
        return hidden


def in_halves(net: Net, x: Tensor, gradient: Tensor) -> Tensor | None:
    """The input's gradient; the weights' are there afterwards, and only then."""
    splitter = Splitter(net)
    with splitter.recording() as tape:
        result = net(x)
    before = net.first.weight.grad
    found = splitter.first_half(tape, result, gradient, x if x.requires_grad else None)
    assert net.first.weight.grad is before
    second_half(tape)
    return found


@pytest.mark.parametrize("is_first", [False, True], ids=["middle", "first stage"])
@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=["float64", "bf16 autocast"])
def test_two_halves_make_the_gradients_of_one_backward(is_first: bool, half: torch.dtype | None) -> None:
    dtype = torch.float64 if half is None else torch.float32
    whole, halves = Net(dtype), Net(dtype)
    with torch.autocast("cpu", dtype=half, enabled=half is not None):
        for seed in range(3):  # later micro-batches add to the first one's gradients
            torch.manual_seed(seed)
            x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=not is_first)
            result = whole(x)
            gradient = torch.randn_like(result)
            result.backward(gradient)
            found = in_halves(halves, x.detach().requires_grad_(not is_first), gradient)
            torch.testing.assert_close(found, x.grad, rtol=0, atol=0)
    tolerance = 1e-13 if half is None else 0.02  # autocast rounds each summand of a weight's gradient
    for (name, one), two in zip(whole.named_parameters(), halves.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        difference = (one.grad - two.grad).abs().max() / one.grad.abs().max()
        assert difference <= tolerance, name


def test_nothing_is_noted_outside_of_a_recording() -> None:
    net = Net(torch.float64)
    splitter = Splitter(net)
    with splitter.recording() as tape:
        pass
    net(torch.randn(1, 8, dtype=torch.float64)).sum().backward()
    assert not tape.weights and net.first.weight.grad is not None


def test_a_forward_that_fails_leaves_no_tape_behind() -> None:
    net = Net(torch.float64)
    with pytest.raises(RuntimeError), Splitter(net).recording() as tape:
        net(torch.randn(1, 9, dtype=torch.float64))
    noted = len(tape.weights)
    net(torch.randn(1, 8, dtype=torch.float64))
    assert len(tape.weights) == noted
