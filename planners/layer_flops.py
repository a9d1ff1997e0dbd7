"""FLOPs of one decoder layer by the parts that activations are planned by, a token, before tensor parallelism.

d features, k = d x KV heads / heads, f MLP width, m matrices of the MLP (a GPT layer has 2, a Llama layer 3)::

    before attention     q, k, v                            2 d (d + 2 k)
    attention            both products, causal: halved      2 d s
    after attention      output matrix and MLP              2 (d d + m d f)

Backward takes the matrices twice, and attention two and a half times, since flash attention makes its scores again.
"""

from dataclasses import dataclass

from distrain.core.vocabulary import ModelShape

MLP_MATRICES = {"gpt": 2, "llama": 3}
"""by the kind of layer"""


@dataclass(frozen=True, slots=True)
class LayerFlops:
    """FLOPs a token of one layer's forward, and what is made from them."""

    before_attention: float
    attention: float
    after_attention: float
    last_product: float
    """of ``after_attention``: nothing that backward needs comes out of it, so it is never done again"""

    @property
    def forward(self) -> float:
        """All of it."""
        return self.before_attention + self.attention + self.after_attention

    @property
    def backward(self) -> float:
        """Without making anything again."""
        return 2.0 * (self.before_attention + self.after_attention) + 2.5 * self.attention

    @property
    def again(self) -> dict[str, float]:
        """What it takes to make the tensors of a group again, by group."""
        return {
            "before_attention": self.before_attention,
            "after_attention": self.after_attention - self.last_product,
        }


def layer_flops(shape: ModelShape, *, kind: str, seq_len: int) -> LayerFlops:
    """Of a layer of ``kind`` (gpt or llama) that attends over ``seq_len`` tokens."""
    d, f, kv_width = shape.d_model, shape.d_ffn, shape.num_kv_heads * shape.head_dim
    return LayerFlops(
        before_attention=2.0 * d * (d + 2 * kv_width),
        attention=2.0 * d * seq_len,
        after_attention=2.0 * (d * d + MLP_MATRICES[kind] * d * f),
        last_product=2.0 * d * f,
    )
