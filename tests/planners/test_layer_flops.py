"""FLOPs of a layer: the parts are the whole, and what is made again leaves the last product out."""

import pytest

from distrain.core.vocabulary import ModelShape
from distrain.planners.layer_flops import layer_flops

SHAPE = ModelShape(d_model=64, num_layers=1, num_heads=8, num_kv_heads=2, d_ffn=160, vocab_size=8)


@pytest.mark.parametrize(("kind", "matrices"), [("gpt", 2), ("llama", 3)])
def test_matrices_take_two_flops_a_parameter_and_attention_is_causal(kind: str, matrices: int) -> None:
    flops = layer_flops(SHAPE, kind=kind, seq_len=1000)
    params = 2 * 64 * 64 + 2 * 64 * 16 + matrices * 64 * 160
    assert flops.forward - flops.attention == 2 * params
    assert flops.attention == 2 * 2 * 64 * 1000 / 2
    assert flops.backward == 2 * 2 * params + 2.5 * flops.attention
    assert sum(flops.again.values()) == 2 * params - 2 * 64 * 160
