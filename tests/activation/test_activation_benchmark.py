"""The benchmark of activations on a GPU, as far as it runs without one: nobody wins by other gradients."""

from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from benchmarks import activation_cuda
from benchmarks.activation_contenders.base import Contender, Job
from benchmarks.harness import Session
from distrain.core.vocabulary import ModelShape

SHAPE = ModelShape(d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, d_ffn=48, vocab_size=8)


class Lazy(Contender):
    """Skips its last layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layers = self.layers[:-1]


def checked(job: Job) -> Session:
    session = Session("activation", quick=True, rounds=1, resume=None, console=Console(quiet=True))
    activation_cuda.check_gradients(session, job)
    return session


def test_a_contender_with_other_gradients_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(SHAPE, 256, "cpu", torch.bfloat16)
    honest = checked(job)
    assert not honest.failed
    assert len(honest.rows) == len(activation_cuda.KINDS) + 1
    lazy: Callable[[Job], Contender] = Lazy
    monkeypatch.setitem(activation_cuda.KINDS, "offload", lazy)
    assert checked(job).failed == ["offload has other gradients than plain PyTorch"]
