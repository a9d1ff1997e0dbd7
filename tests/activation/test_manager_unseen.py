"""What the tape does not see, or sees too late: gradients are right to the bit, or there is an error."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distrain.activation.engine import MOST_REMEMBERED, Engine
from distrain.activation.host_pool import HostPool
from distrain.activation.manager import ActivationManager
from distrain.activation.recipe import Recipe
from distrain.activation.tape import Tape
from distrain.core.device import CpuDevice
from distrain.planners.activation_plan import ActivationPlan, LayerPlan, Split, snap, uniform

NUM_TOKENS, WIDTH = 256, 16
WAYS = {
    "memo": LayerPlan.of(snap(NUM_TOKENS, swap=0.5)),
    "all again": LayerPlan.of(Split(recompute=NUM_TOKENS)),
    "keep half": LayerPlan.of(snap(NUM_TOKENS, keep=0.5)),
    "recompute": uniform("recompute", num_layers=1, num_tokens=NUM_TOKENS).layers[0],
}


def plan(way: str) -> ActivationPlan:
    return ActivationPlan(layers=(WAYS[way],))


def sample() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, NUM_TOKENS, WIDTH, generator=generator).requires_grad_()


class Layer(nn.Module):
    """Does what it is told between two matrices."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
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


class Unseen(torch.autograd.Function):
    """A kernel below the dispatcher, as Triton's are: it fills memory that torch has only reserved."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, reserve: Callable[[Tensor], Tensor]) -> Tensor:
        out = reserve(y)
        out.numpy()[...] = y.detach().numpy() * 3
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * 3, None


RESERVE: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda y: torch.empty(y.shape),
    "empty_like": torch.empty_like,
    "empty_strided": lambda y: torch.empty_strided(y.shape, y.stride()),
    "new_empty": lambda y: y.new_empty(y.shape),
}


@pytest.mark.parametrize("reserve", RESERVE.values(), ids=RESERVE)
@pytest.mark.parametrize("way", WAYS)
def test_memory_that_a_kernel_fills_unseen_is_not_taken_for_what_it_was_before(
    way: str, reserve: Callable[[Tensor], Tensor]
) -> None:
    def middle(y: Tensor) -> Tensor:
        filled: Tensor = Unseen.apply(y, reserve)  # type: ignore[no-untyped-call]
        return (y + filled).sin()

    layer = Layer(middle)
    truth = grads(layer, sample())
    with ActivationManager([layer], plan(way)):
        assert_same(grads(layer, sample()), truth)


def test_the_generator_of_the_device_that_is_named_is_put_back() -> None:
    here = torch.zeros(2)
    with Tape({}, []) as tape:
        torch.rand(2)
        torch.rand(2, device="meta")
        torch.rand_like(here)
        torch.rand_like(here, device="meta")
    assert [draw.device.type for draw in tape.seeds] == ["cpu", "meta", "cpu", "meta"]


class InPlace(torch.autograd.Function):
    """A kernel that writes to memory that it was given, and tells nobody: rotary embeddings are often done so."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        out = y.clone()
        out.numpy()[...] *= 3
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 3


def in_place(y: Tensor) -> Tensor:
    result: Tensor = InPlace.apply(y)  # type: ignore[no-untyped-call]
    return result


@pytest.mark.parametrize("way", WAYS)
def test_a_kernel_that_changes_its_memory_unseen_in_one_of_two_layers_alike_is_found_out(way: str) -> None:
    layers = nn.Sequential(Layer(torch.clone), Layer(in_place))
    truth = grads(layers, sample())
    with ActivationManager(layers, ActivationPlan(layers=(WAYS[way],) * 2)) as manager:
        for _ in range(2):
            assert_same(grads(layers, sample()), truth)
        assert manager.report().recomputed_bytes > 0, "of the layer that hides nothing"


@torch.library.custom_op("distrain_test::thinned", mutates_args=())
def thinned(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) > 0.3)


thinned.register_autograd(
    lambda ctx, grad: grad * ctx.kept,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "kept", output != 0),
)


@pytest.mark.parametrize("way", WAYS)
def test_an_operator_that_draws_without_saying_so_is_not_done_again(way: str) -> None:
    def seeded() -> list[Tensor]:
        torch.manual_seed(5)
        return grads(layer, sample())

    layer = Layer(lambda y: thinned(y))
    truth = seeded()
    with ActivationManager([layer], plan(way)):
        for _ in range(2):
            assert_same(seeded(), truth)


@torch.library.custom_op("distrain_test::coarse", mutates_args=())
def coarse(x: Tensor) -> Tensor:
    """Rounded to what the largest element allows; the scale is a power of two, so most samples have the same."""
    scale = 2.0 ** torch.ceil(torch.log2(x.abs().max()))
    return torch.round(x / scale * 8) * scale / 8


coarse.register_autograd(lambda ctx, grad: grad, setup_context=lambda ctx, inputs, output: None)


@pytest.mark.parametrize("way", WAYS)
def test_what_scales_by_the_largest_of_all_tokens_is_not_taken_for_local(way: str) -> None:
    def spiky(factor: float) -> Tensor:
        x = sample().detach()
        x[:, 0] *= factor
        return x.requires_grad_()

    layer = Layer(lambda y: coarse(y).tanh())
    truths = [grads(layer, spiky(factor)) for factor in (1.0, 50.0)]
    with ActivationManager([layer], plan(way)):
        for factor, truth in zip((1.0, 50.0), truths, strict=True):
            assert_same(grads(layer, spiky(factor)), truth)


class Tight:
    """An operator that a full device refuses from the second call on, while ``is_full``."""

    is_full = False
    num_calls = 0


@torch.library.custom_op("distrain_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    Tight.num_calls += 1
    if Tight.is_full and Tight.num_calls > 1:
        raise torch.OutOfMemoryError("the device is full")
    return x * 2


doubled.register_autograd(lambda ctx, grad: grad * 2, setup_context=lambda ctx, inputs, output: None)


def test_a_device_that_is_full_while_an_operator_is_tried_says_nothing_of_the_operator() -> None:
    layer = Layer(lambda y: doubled(y))
    truth = grads(layer, sample())
    with ActivationManager([layer], plan("memo")) as manager:
        Tight.num_calls, Tight.is_full = 0, True
        try:
            with pytest.raises(torch.OutOfMemoryError):
                grads(layer, sample())
        finally:
            Tight.is_full = False
        gc.collect()
        manager.report()
        assert_same(grads(layer, sample()), truth)
        report = manager.report()
    with ActivationManager([layer], plan("memo")) as fresh:
        grads(layer, sample())
    assert report.recomputed_bytes == fresh.report().recomputed_bytes > 0


class Masked(Layer):
    """Adds a constant or a buffer, which torch has no reason to save."""

    mask: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__(lambda y: (y + table + self.mask).sin())
        self.register_buffer("mask", torch.ones(NUM_TOKENS, 2 * WIDTH))


@pytest.mark.parametrize("which", ["constant", "buffer", "bias"])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_layer_adds_and_somebody_refills_before_backward_is_refused(way: str, which: str) -> None:
    """Legal, as torch does not need it; but what is made again from it would be wrong."""
    table = torch.randn(NUM_TOKENS, 2 * WIDTH)
    layer = Masked(table)
    refilled = {"constant": table, "buffer": layer.mask, "bias": layer.first.bias}[which]
    with ActivationManager([layer], plan(way)) as manager:
        first = layer(sample()).sum()
        refilled.data.add_(0)  # as sharding gathers a parameter again: torch counts no change, nor do we
        first.backward()
        loss = layer(sample()).sum()
        with torch.no_grad():
            refilled.fill_(0.5)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*one of its own"):
            loss.backward()
        del loss, first
        gc.collect()
        assert_same(grads(layer, sample()), grads(layer, sample()))
    assert manager.report().host_bytes == 0


class Shifted(nn.Module):
    """Of its input nothing is saved."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1).exp().sin()


@pytest.mark.parametrize("place", ["kept", "swapped"])
def test_an_input_that_nobody_saved_and_somebody_changes_is_refused(place: str) -> None:
    all_there = Split(keep=NUM_TOKENS) if place == "kept" else Split(swap=NUM_TOKENS)
    layer_plan = LayerPlan.of(Split(recompute=NUM_TOKENS), input=all_there)
    layer, x = Shifted(), sample()
    with ActivationManager([layer], ActivationPlan(layers=(layer_plan,))):
        loss = layer(x).sum()
        with torch.no_grad():
            x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_constant_from_inference_mode_cannot_change_and_is_used() -> None:
    with torch.inference_mode():
        table = torch.randn(NUM_TOKENS, 2 * WIDTH)
    layer = Layer(lambda y: (y + table).sin())
    truth = grads(layer, sample())
    with ActivationManager([layer], plan("memo")) as manager:
        assert_same(grads(layer, sample()), truth)
    assert manager.report().recomputed_bytes > 0


class Spoiling(nn.Module):
    """Changes its input when it has been used, in a way that leaves no other mark in the program."""

    spoils = False

    def forward(self, x: Tensor) -> Tensor:
        y = (x + 1).exp()
        if self.spoils:
            with torch.no_grad():
                torch._foreach_mul_([x], 2.0)
        return y.sin()


def test_what_was_found_out_does_not_serve_a_forward_that_spoils_its_input() -> None:
    layer = Spoiling()

    def run(*, spoils: bool) -> list[Tensor]:
        layer.spoils = spoils
        x = sample()
        return list(torch.autograd.grad(layer(x).square().mean(), [x]))

    truths = [run(spoils=spoils) for spoils in (False, True, False)]
    with ActivationManager([layer], plan("all again")):
        for spoils, truth in zip((False, True, False), truths, strict=True):
            assert_same(run(spoils=spoils), truth)


def test_what_is_remembered_has_an_end() -> None:
    engine = Engine(CpuDevice(), HostPool(CpuDevice()), groups=())
    written: list[int] = []

    def ask(key: int) -> None:
        engine.known(key, lambda: written.append(key) or Recipe((), {}, {}, -1))  # type: ignore[func-returns-value]

    for key in range(MOST_REMEMBERED + 1):
        ask(key)
    ask(MOST_REMEMBERED)
    ask(1)
    assert written == list(range(MOST_REMEMBERED + 1)), "what is young is known"
    ask(0)
    assert written[-1] == 0, "what is old was forgotten"
