"""What a memory plan is asked: a model at a length on a machine, and a layer of it as it was traced."""

from collections.abc import Mapping
from dataclasses import dataclass

from distrain.core.errors import Problem
from distrain.core.vocabulary import ModelShape

from .buffers import Buffer
from .layer_flops import LayerFlops, layer_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """One rank's layer as it was traced; ticks count from the start of its pass."""

    num_tokens: int
    """rows of one rank"""
    hidden_bytes: int
    """what goes from a layer to the next"""
    group_bytes: Mapping[str, int]
    """skeletal bytes, by ``planners.activations.GROUPS``"""
    forward: tuple[Buffer, ...]
    forward_ticks: int
    backward: tuple[Buffer, ...]
    backward_ticks: int
    gradient_birth: int
    """tick of backward at which the gradient of the input is made"""

    @property
    def layer_bytes(self) -> int:
        """All that forward leaves for backward."""
        return sum(self.group_bytes.values())


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """The question."""

    shape: ModelShape
    kind: str
    """gpt or llama: what a layer is made of"""
    seq_len: int
    tp: int
    cp: int
    pp: int
    dp: int
    micro_batches: int
    gpus_per_node: int
    peak_flops: float
    """of one GPU, for utilisation"""
    flops: float
    """FLOP/s that one GPU achieves"""
    hbm_bytes: int
    host_bytes: int
    """of one node, for swapped activations"""
    link_bytes_s: float
    """of one GPU to the host and back, all GPUs of a node at once"""

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.tp * self.cp * self.pp * self.dp

    @property
    def layer_params(self) -> int:
        """Parameters of one layer."""
        matrices = self.layer_flops
        return round((matrices.before_attention + matrices.after_attention) / 2)

    @property
    def num_params(self) -> int:
        """Parameters of the model; embedding and head are not tied."""
        return self.shape.num_layers * self.layer_params + 2 * self.shape.vocab_size * self.shape.d_model

    @property
    def layer_flops(self) -> LayerFlops:
        """Of a token in one layer."""
        return layer_flops(self.shape, kind=self.kind, seq_len=self.seq_len)

    @property
    def flop_s(self) -> float:
        """One rank's time for one FLOP of each of its tokens."""
        return self.seq_len / (self.tp * self.cp) / self.flops

    @property
    def forward_s(self) -> float:
        """Of one layer."""
        return self.layer_flops.forward * self.flop_s

    @property
    def backward_s(self) -> float:
        """Of one layer."""
        return self.layer_flops.backward * self.flop_s

    @property
    def stage_layers(self) -> int:
        """Layers of a pipeline rank, the largest."""
        return -(-self.shape.num_layers // self.pp)

    @property
    def host_bytes_rank(self) -> float:
        """A GPU's share of its node's host."""
        return self.host_bytes / min(self.gpus_per_node, self.gpus)


def request_problems(request: MemoryRequest) -> list[Problem]:
    """What cannot be: layers over pipeline ranks, micro-batches; empty if all can."""
    problems = []
    if request.pp > request.shape.num_layers:
        most = f"1 to {request.shape.num_layers}, one layer each"
        problems.append(
            Problem("there are more pipeline ranks than layers", got=f"pp = {request.pp}", allowed=most)
        )
    if request.micro_batches < 1:
        problems.append(
            Problem("a step needs micro-batches", got=str(request.micro_batches), allowed="1 and up")
        )
    return problems


def layer_problems(shape: ModelShape, *, tp: int, cp: int, seq_len: int) -> list[Problem]:
    """Why a layer cannot be shared out like that; empty if it can."""
    ways = tp * cp
    wanted = (
        ("model.num_heads", shape.num_heads, "tp x cp", ways),
        ("model.num_kv_heads", shape.num_kv_heads, "tp x cp", ways),
        ("model.d_ffn", shape.d_ffn, "tp", tp),
        ("the sequence length", seq_len, "tp x cp", ways),
    )
    return [
        Problem(f"{of} does not divide {name}", got=f"{of} = {by}, {name} = {number}", allowed=f"divisors of {number}")
        for name, number, of, by in wanted
        if number % by
    ]  # fmt: skip
