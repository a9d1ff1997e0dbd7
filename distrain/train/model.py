"""A Llama-style decoder whose pieces keep their global names however it is cut.

A ``Decoder`` holds any contiguous range of layers, with or without the embedding and the output head, so that one
class serves as whole model and as pipeline stage: ``layers.7.attn.wq.weight`` is called so on every rank. It knows
nothing of parallelism; ``roles`` says what each module is, and ``parallel.tensor`` decides what to do with that.

Shapes: B sequences, T tokens, D model features, H heads, K key/value heads, E features of a head, V vocabulary.
With tensor parallelism a stage's hidden state is [B, T / tp, D], and H, K are the local heads.

Sequences of different lengths can also lie one behind the other in a single row, of which a rank has a part. Then a
``packed`` argument goes with the tokens, which knows their positions and how to attend: nothing else in the model
asks where a token stands.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distrain.core.vocabulary import ModelShape
from distrain.parallel.deferred import Linear
from distrain.parallel.roles import Role


class Packed(Protocol):
    """The tokens of a row [1, T]: which positions they have in their sequences, and how these attend."""

    @property
    def positions(self) -> Tensor:
        """int64 [T]."""
        ...

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Causal attention inside each sequence: [T, H, E]."""
        ...


class Rotary:
    """Rotary position tables and attention masks, kept for the next call with the same length or packed row."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._key: tuple[object, ...] = ()
        self._tables: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._packed: tuple[Packed, torch.dtype, Tensor, Tensor] | None = None

    def tables(self, num_tokens: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """cos and sin [T, E/2], and the boolean band mask [T, T] if a window is shorter than T (otherwise None)."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = (num_tokens, dtype, like.device)
        if self._tables is None or self._key != key:
            self._tables, self._key = self._build(num_tokens, dtype, like.device), key
        return self._tables

    def packed(self, row: Packed, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, E/2] of the positions of ``row``."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self._packed is None or self._packed[0] is not row or self._packed[1] != dtype:
            angles = self._angles(row.positions.double())
            self._packed = row, dtype, angles.cos().to(dtype), angles.sin().to(dtype)
        return self._packed[2:]

    def _angles(self, positions_T: Tensor) -> Tensor:
        """[T, E/2], in float64: at a million tokens, float32 would lose the fast frequencies."""
        exponents = (
            torch.arange(0, self._shape.head_dim, 2, dtype=torch.float64, device=positions_T.device)
            / self._shape.head_dim
        )
        return torch.outer(positions_T, self._shape.rope_theta**-exponents)

    def _build(
        self, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        positions = torch.arange(num_tokens, dtype=torch.float64, device=device)
        angles = self._angles(positions)
        mask = None
        if 0 < self._shape.window < num_tokens:
            distance = positions[:, None] - positions[None, :]
            mask = (distance >= 0) & (distance < self._shape.window)
        return angles.cos().to(dtype), angles.sin().to(dtype), mask


def rotate(x_BHTE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Turn the two halves of each head by the angles of its position; any dims that broadcast against x's will do."""
    first, second = x_BHTE.chunk(2, dim=-1)
    turned = torch.cat((first * cos_TF - second * sin_TF, second * cos_TF + first * sin_TF), dim=-1)
    return turned.to(x_BHTE.dtype)


def _as_computed(x: Tensor) -> Tensor:
    """``x`` in autocast's type, once for all matrices that read it: they would keep a copy each, and gather float32."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: ModelShape, rotary: Rotary) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.rotary = rotary
        kv_width = shape.num_kv_heads * shape.head_dim
        self.wq = Linear(shape.d_model, shape.d_model, bias=False)
        self.wk = Linear(shape.d_model, kv_width, bias=False)
        self.wv = Linear(shape.d_model, kv_width, bias=False)
        self.wo = Linear(shape.d_model, shape.d_model, bias=False)

    def forward(self, x_BTD: Tensor, *, packed: Packed | None = None) -> Tensor:
        """Attend over all T tokens of each sequence: [B, T, D] -> [B, T, D]; B is 1 if they are ``packed``."""
        if packed is not None:
            return self._forward_packed(x_BTD, packed)
        q_BHTE, k_BKTE, v_BKTE = (
            proj(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.wq, self.wk, self.wv)
        )
        cos, sin, mask = self.rotary.tables(q_BHTE.shape[2], q_BHTE)
        q_BHTE, k_BKTE = rotate(q_BHTE, cos, sin), rotate(k_BKTE, cos, sin)
        out_BHTE = F.scaled_dot_product_attention(
            q_BHTE,
            k_BKTE,
            v_BKTE,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q_BHTE.shape[1] != k_BKTE.shape[1],
        )
        return self.wo(out_BHTE.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _forward_packed(self, x_1TD: Tensor, packed: Packed) -> Tensor:
        q_THE, k_TKE, v_TKE = (
            proj(x_1TD).squeeze(0).unflatten(-1, (-1, self.head_dim)) for proj in (self.wq, self.wk, self.wv)
        )
        cos, sin = (table.unsqueeze(1) for table in self.rotary.packed(packed, q_THE))
        out_THE = packed.attend(rotate(q_THE, cos, sin), rotate(k_TKE, cos, sin), v_TKE)
        return self.wo(out_THE.flatten(1).unsqueeze(0))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.w_gate = Linear(shape.d_model, shape.d_ffn, bias=False)
        self.w_up = Linear(shape.d_model, shape.d_ffn, bias=False)
        self.w_down = Linear(shape.d_ffn, shape.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], token by token."""
        return self.w_down(F.silu(self.w_gate(x_BTD)) * self.w_up(x_BTD))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One decoder layer; serial as in Llama, or MegaScale's parallel form (section 3.1) with a single norm."""

    def __init__(self, shape: ModelShape, rotary: Rotary) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.attn = Attention(shape, rotary)
        self.mlp_norm = None if shape.parallel_block else nn.RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x_BTD: Tensor, *, packed: Packed | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        normed = _as_computed(self.attn_norm(x_BTD))
        if self.mlp_norm is None:
            return x_BTD + self.attn(normed, packed=packed) + self.mlp(normed)  # type: ignore[no-any-return]
        x_BTD = x_BTD + self.attn(normed, packed=packed)
        return x_BTD + self.mlp(_as_computed(self.mlp_norm(x_BTD)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Layers ``first_layer`` to ``last_layer`` (half-open) of the model ``shape``.

    The stage that starts at layer 0 also embeds, the one that ends at the last layer also norms and projects.
    """

    def __init__(self, shape: ModelShape, *, first_layer: int = 0, last_layer: int | None = None) -> None:
        super().__init__()
        last_layer = shape.num_layers if last_layer is None else last_layer
        rotary = Rotary(shape)
        self.embed = nn.Embedding(shape.vocab_size, shape.d_model) if first_layer == 0 else None
        self.layers = nn.ModuleDict({str(i): Block(shape, rotary) for i in range(first_layer, last_layer)})
        is_last = last_layer == shape.num_layers
        self.norm = nn.RMSNorm(shape.d_model, eps=shape.norm_eps) if is_last else None
        self.head = Linear(shape.d_model, shape.vocab_size, bias=False) if is_last else None

    def forward(self, x: Tensor, *, packed: Packed | None = None) -> Tensor:
        """Token ids [B, T] (first stage) or hidden state [B, T, D] -> hidden state, or logits [B, T, V] (last)."""
        if self.embed is not None:
            x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x, packed=packed)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x

    def roles(self) -> dict[str, Role]:
        """What each module is to a parallel layout, by its name."""
        kinds: dict[str, Role] = {}
        if self.embed is not None:
            kinds["embed"] = Role.EMBEDDING
        for index, block in self.layers.items():
            kinds |= {
                f"layers.{index}.{name}": role
                for name, role in _BLOCK_ROLES
                if getattr(block, name.split(".")[0])
            }
        if self.head is not None:
            kinds |= {"norm": Role.NORM, "head": Role.HEAD}
        return kinds


_BLOCK_ROLES = (
    ("attn_norm", Role.NORM),
    ("attn", Role.BRANCH),
    ("attn.wq", Role.COLUMN),
    ("attn.wk", Role.COLUMN),
    ("attn.wv", Role.COLUMN),
    ("attn.wo", Role.ROW),
    ("mlp_norm", Role.NORM),
    ("mlp", Role.BRANCH),
    ("mlp.w_gate", Role.COLUMN),
    ("mlp.w_up", Role.COLUMN),
    ("mlp.w_down", Role.ROW),
)
