"""One rank's share of a transformer layer, to be traced: real operators, and collectives as changes of shape.

Tokens are split over ``tp * cp`` ranks where layers norm and add (sequence parallelism), heads over as many where they
attend (Ulysses over cp). Matrices are split over tp, and see what tp ranks gather. As in Megatron the gathered input is
not kept for backward: it is gathered again::

    norm, residual      [B, T / (tp cp), D]
    qkv, up, gate       [B, T / cp, D] -> [B, T / cp, . / tp]
    attention           [B, T, heads / (tp cp), E]
    out, down           [B, T / cp, . / tp] -> partial sums [B, T / cp, D], scattered back to the tokens

A collective is traced as the buffer that it fills. Two kinds: ``gpt``, MEMO's layer (layer norms with biases, GELU),
and ``llama``, this project's (RMS norms, rotary positions, grouped queries, SwiGLU). Without dropout.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.core.errors import raise_if
from distrain.core.vocabulary import ModelShape
from distrain.planners.memory_request import layer_problems

Kind = Literal["gpt", "llama"]


def rank_layer(shape: ModelShape, *, kind: Kind, tp: int, cp: int) -> nn.Module:
    """The layer on the meta device in bfloat16: maps one rank's hidden state [B, T / (tp cp), D] to the next."""
    raise_if(layer_problems(shape, tp=tp, cp=cp, seq_len=tp * cp))
    with torch.device("meta"):
        layer = _Layer(shape, kind, tp, cp)
    return layer.to(torch.bfloat16)


class _Layer(nn.Module):
    def __init__(self, shape: ModelShape, kind: Kind, tp: int, cp: int) -> None:
        super().__init__()
        self.tp, self.cp, self.gpt = tp, cp, kind == "gpt"
        self.head_dim = shape.head_dim
        d, f, kv = shape.d_model, shape.d_ffn // tp, shape.num_kv_heads * shape.head_dim // tp
        norm: Callable[[int], nn.Module] = nn.LayerNorm if self.gpt else _FusedRMSNorm
        self.attn_norm, self.mlp_norm = norm(d), norm(d)
        widths = (d // tp + 2 * kv,) if self.gpt else (d // tp, kv, kv)
        self.w_qkv = nn.ModuleList(nn.Linear(d, width, bias=self.gpt) for width in widths)
        self.w_out = nn.Linear(d // tp, d, bias=self.gpt)
        self.w_up = nn.Linear(d, f if self.gpt else 2 * f, bias=self.gpt)
        self.w_down = nn.Linear(f, d, bias=self.gpt)
        self.kv = kv

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T / (tp cp), D] -> the same."""
        x_BTD = x_BTD + self._collect(self._attend(*self._queries(self.attn_norm(x_BTD))), self.w_out)
        wide = self._spread(self.mlp_norm(x_BTD), self.w_up)
        if self.gpt:
            wide = F.gelu(wide)
        else:
            gate, up = wide.chunk(2, dim=-1)
            wide = F.silu(gate) * up
        return x_BTD + self._collect(wide, self.w_down)

    def _queries(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values [B, T, heads / (tp cp), E]: all T tokens, 1 / cp of the rank's heads."""
        products = [self._spread(x, each) for each in self.w_qkv if isinstance(each, nn.Linear)]
        if self.cp > 1:
            products = [
                _exchange(each, (each.shape[0], each.shape[1] * self.cp, each.shape[2] // self.cp))
                for each in products
            ]
        if self.gpt:
            kv = self.kv // self.cp
            products = list(products[0].split([products[0].shape[-1] - 2 * kv, kv, kv], dim=-1))
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)) for each in products)
        return [q, k, v] if self.gpt else [_rotate(q), _rotate(k), v]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, T, heads / (tp cp), E] -> [B, T / cp, . / tp]."""
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        out = out.transpose(1, 2).flatten(2)
        if self.cp == 1:
            return out
        return _exchange(out, (out.shape[0], out.shape[1] // self.cp, out.shape[2] * self.cp))

    def _spread(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """Gather the tokens of tp ranks and multiply by this rank's columns."""
        if self.tp == 1:
            return linear(x)  # type: ignore[no-any-return]
        out: Tensor = _GatheredProduct.apply(x, linear.weight, self.tp)  # type: ignore[no-untyped-call]
        return out if linear.bias is None else out + linear.bias

    def _collect(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """Multiply by this rank's rows, and sum over tp ranks, each keeping its tokens."""
        if self.tp == 1:
            return linear(x)  # type: ignore[no-any-return]
        out = F.linear(x, linear.weight)
        out = _exchange(out, (out.shape[0], out.shape[1] // self.tp, out.shape[2]))
        return out if linear.bias is None else out + linear.bias


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions: linear in ``x``, so that backward needs the angles alone, and all layers share those."""
    return _Exchange.apply(x, x.shape)  # type: ignore[no-any-return, no-untyped-call]


class _FusedRMSNorm(nn.Module):
    """As the one kernel that CUDA has for it, which keeps its input and a number a token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape whose last dim is the width."""
        return _NormInOneKernel.apply(x, self.weight)  # type: ignore[no-any-return, no-untyped-call]


class _NormInOneKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _exchange(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return _Exchange.apply(x, shape)  # type: ignore[no-any-return, no-untyped-call]


class _Exchange(torch.autograd.Function):
    """A linear change of layout, such as a collective, by the memory of its result: nothing is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        ctx.shape = x.shape
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_empty(ctx.shape), None


class _GatheredProduct(torch.autograd.Function):
    """all-gather over tokens, then ``x @ w.T``; keeps the rank's own tokens only and gathers anew in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tp: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tp = tp
        return _gathered(x, tp) @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        x_gradient = (gradient @ weight).new_empty(x.shape)
        w_gradient = gradient.flatten(0, -2).t() @ _gathered(x, ctx.tp).flatten(0, -2)
        return x_gradient, w_gradient, None


def _gathered(x: Tensor, tp: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * tp, x.shape[2])
