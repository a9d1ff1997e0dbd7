"""What the activation benchmark asks of a contender, and the model that all of them train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distrain.core.vocabulary import ModelShape
from distrain.train.model import Block, Rotary

Forward = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Job:
    """Layers of one shape, and the sequence that they see."""

    shape: ModelShape
    num_tokens: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def layers(self) -> nn.ModuleList:
        """The same weights each time; gradients are there already, as they are from the second step on."""
        torch.manual_seed(1)
        with torch.device(self.device):
            rotary = Rotary(self.shape)
            layers = nn.ModuleList(
                [Block(self.shape, rotary).to(self.dtype) for _ in range(self.shape.num_layers)]
            )
        for parameter in layers.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return layers

    def sample(self) -> Tensor:
        """The first layer's input: with a gradient, as an embedding's output has."""
        generator = torch.Generator(self.device).manual_seed(2)
        shape = (1, self.num_tokens, self.shape.d_model)
        x = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        return x.requires_grad_()


@dataclass
class HostMark:
    """Says which allocations stand for host memory where device and host are both the processor's."""

    depth: int = 0

    @contextmanager
    def host(self) -> Iterator[None]:
        """What is allocated inside is on the host."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


@dataclass
class Contender:
    """Plain PyTorch, which the others change.

    A contender may change how a layer is called, or what surrounds the whole step.
    """

    job: Job
    mark: HostMark = field(default_factory=HostMark)

    def __post_init__(self) -> None:
        self.layers = self.job.layers()
        self.x = self.job.sample()

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Run one layer."""
        result: Tensor = layer(x)
        return result

    @contextmanager
    def around(self) -> Iterator[None]:
        """Around forward and backward."""
        yield

    def step(self) -> None:
        """Forward and backward."""
        with self.around():
            y = self.x
            for layer in self.layers:
                y = self.call(layer, y)
            y.float().square().mean().backward()

    def gradients(self) -> list[Tensor]:
        """Of one step, from zero."""
        self.zero()
        self.step()
        return [each.grad.clone() for each in (self.x, *self.layers.parameters()) if each.grad is not None]

    def zero(self) -> None:
        """Forget the gradients, but not their memory."""
        for each in (self.x, *self.layers.parameters()):
            if each.grad is not None:
                each.grad.zero_()
