"""The formulas for activations against what autograd really keeps of the trainer's model."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distrain.core.vocabulary import ModelShape
from distrain.parallel.tensor import token_loss
from distrain.planners.activations import Precision, token_bytes
from distrain.train.model import Decoder


def kept_bytes(shape: ModelShape, dtype: str, *, num_tokens: int) -> int:
    """Bytes of everything that one forward pass keeps, weights and autocast's copies of them aside."""
    model = Decoder(shape).to(torch.float64 if dtype == "float64" else torch.float32)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    copied = sum(weight.numel() for name, weight in model.named_parameters() if weight.dim() == 2)
    copied -= shape.vocab_size * shape.d_model
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    ids = torch.randint(shape.vocab_size, (2, num_tokens // 2))
    bf16 = dtype == "bfloat16"
    with (
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext(),
    ):
        token_loss(model(ids), ids)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return total - 2 * copied * bf16


@pytest.mark.parametrize("parallel_block", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_forward_pass_keeps_what_the_formula_says(dtype: str, parallel_block: bool) -> None:
    shape = ModelShape(
        d_model=64,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        d_ffn=192,
        vocab_size=512,
        parallel_block=parallel_block,
    )
    # Beside it there are ids, a few numbers a token for norms, and rotary tables of the sequence.
    small = 64 + 512 * (8 + 8 * (2 * shape.num_layers + 1)) + 256 * 8 * 8
    token = token_bytes(shape, tp=1, precision=Precision.of(dtype), fused_norms=False)
    predicted = 512 * (shape.num_layers * token.layer + token.output + token.logits)
    kept = kept_bytes(shape, dtype, num_tokens=512)
    assert predicted <= kept <= predicted + small
