"""Bytes that a forward pass leaves for its backward, per token, as torch's autograd keeps them.

The counting of Korthikanti et al. (2205.05198, section 4) for a Llama block with flash attention and no
recomputation, adapted to what the trainer does, tensor by tensor (d features, k = d x KV heads / heads, f
MLP width; w bytes of the residual stream, c bytes of matrix products)::

    input of each norm                               2 d w        split over tokens by tp
    normed input of the matrices                     n d c        gathered: every tp rank keeps all tokens
    q, attention output, input of the output matrix  3 d c        split over heads
    k, v                                             2 k c        split over heads
    log-sum-exp of attention                         heads x w    split over heads
    gate, silu(gate), up, their product              4 f c        split over features

The gathered inputs are the one part that tensor parallelism does not divide: Megatron gathers anew in
backward instead. ``n`` is 2, one for each branch; the model casts a norm's output once, for all matrices
that read it. A norm that is not one kernel (on a CPU) keeps its normalised input too.
"""

from dataclasses import dataclass

from distrain.core.errors import ConfigError
from distrain.core.vocabulary import ModelShape


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of one number: of weights and residual stream, and of matrix products."""

    weight_bytes: int
    compute_bytes: int

    @property
    def autocast(self) -> bool:
        """Whether matrices are cast for their products."""
        return self.compute_bytes < self.weight_bytes

    @classmethod
    def of(cls, dtype: str) -> "Precision":
        """The precision that ``train.dtype`` names."""
        known = {"float32": cls(4, 4), "bfloat16": cls(4, 2), "float64": cls(8, 8)}
        if dtype not in known:
            raise ConfigError("no such precision", got=dtype, allowed=", ".join(known))
        return known[dtype]


GROUPS = ("input", "attention", "before_attention", "after_attention")
"""by what becomes of them: what others are made again from, what is not made again, and what lies on both sides"""


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """Bytes a rank keeps for each token of a micro-batch (all tokens of the sequence, before tp splits
    them)."""

    layer: float
    """one decoder layer"""
    output: float
    """final norm and input of the head, on the last stage"""
    logits: float
    """log-probabilities, on the last stage"""
    hidden: float
    """the hidden state between two stages"""
    groups: tuple[float, ...]
    """``layer`` by ``GROUPS``"""


def token_bytes(shape: ModelShape, *, tp: int, precision: Precision, fused_norms: bool) -> TokenBytes:
    """What one token costs; ``fused_norms`` as on CUDA."""
    d, w, c = shape.d_model, precision.weight_bytes, precision.compute_bytes
    norm = d * w * (1 if fused_norms else 2) / tp
    num_norms = 1 if shape.parallel_block else 2
    # Without tp both branches of a parallel block read one and the same tensor.
    gathered = 1 if shape.parallel_block and tp == 1 else 2
    kv_width = shape.num_kv_heads * shape.head_dim
    around = norm - d * w / tp  # what a norm keeps beside its input
    groups = (
        d * w / tp,
        (2 * d * c + shape.num_heads * w) / tp,
        around + d * c + (d + 2 * kv_width) * c / tp,
        (num_norms - 1) * norm + (gathered - 1) * d * c + 4 * shape.d_ffn * c / tp,
    )
    return TokenBytes(
        layer=sum(groups),
        output=norm + d * c,
        logits=shape.vocab_size * w / tp,
        hidden=d * w / tp,
        groups=groups,
    )
