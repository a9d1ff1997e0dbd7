"""A packed row in the model: what it computes, what it keeps, and that rows without it go their old way."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distrain.core.vocabulary import ModelShape
from distrain.parallel.sequence.adaptive import PackedRow
from distrain.parallel.sequence.attention import SequenceAttention
from distrain.parallel.sequence.layout import SequenceLayout
from distrain.parallel.tensor import token_loss
from distrain.planners.activations import Precision, token_bytes
from distrain.train.data.micro import pack
from distrain.train.model import Decoder
from distrain.train.weights import materialize

SHAPE = ModelShape(d_model=64, num_layers=3, num_heads=8, num_kv_heads=4, d_ffn=192, vocab_size=512)


def decoder(dtype: torch.dtype = torch.float64) -> Decoder:
    with torch.device("meta"):
        model = Decoder(SHAPE).to(dtype)
    materialize(model, device=torch.device("cpu"), seed=3, num_layers=SHAPE.num_layers)
    return model


def row_of(lengths: list[int]) -> PackedRow:
    layout = SequenceLayout.build(lengths)
    return PackedRow(torch.from_numpy(layout.positions(0)), SequenceAttention(layout))


def test_sequences_in_one_row_do_not_see_each_other() -> None:
    model, lengths = decoder(), [7, 1, 20]
    sequences = [torch.randint(512, (length,)) for length in lengths]
    with torch.no_grad():
        together = model(torch.cat(sequences)[None], packed=row_of(lengths))[0]
        apart = torch.cat([model(ids[None])[0] for ids in sequences])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


def test_the_rows_of_other_tokens_are_not_those_of_the_last_call() -> None:
    """Rotary tables are kept from layer to layer, and must not be from row to row."""
    model, ids = decoder(), torch.randint(512, (1, 12))
    with torch.no_grad():
        before = model(ids, packed=row_of([12]))
        model(ids, packed=row_of([5, 7]))
        after = model(ids, packed=row_of([12]))
        plain = model(ids)
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    torch.testing.assert_close(plain, after, rtol=1e-12, atol=1e-12)


def test_tokens_of_a_share_come_with_their_targets_and_padding_without() -> None:
    sequences = [torch.arange(5).numpy(), torch.arange(10, 13).numpy()]
    inputs, targets = pack(sequences, torch.tensor([4, 5, -1, 0, 3]).numpy())
    assert inputs.tolist() == [[10, 11, 0, 0, 3]]
    assert targets.tolist() == [[11, 12, -100, 1, 4]]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_packed_row_keeps_what_the_formula_says(dtype: str) -> None:
    kept: dict[int, Tensor] = {}
    model = decoder(getattr(torch, dtype))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            kept[address] = tensor
        return tensor

    lengths = [200, 12, 300]
    ids = torch.randint(512, (1, sum(lengths)))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        token_loss(model(ids, packed=row_of(lengths)), ids)
    token = token_bytes(SHAPE, tp=1, precision=Precision.of(dtype), fused_norms=False)
    predicted = 512 * (SHAPE.num_layers * token.layer + token.output + token.logits)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # Beside it: ids, a few numbers a token for norms, rotary tables.
    small = 64 + 512 * (8 + 8 * (2 * SHAPE.num_layers + 1)) + 512 * 8 * 8 * 2
    # On a rank by itself the output of attention and the input of the matrix behind it are one.
    shared = 512 * SHAPE.num_layers * SHAPE.d_model * Precision.of(dtype).compute_bytes
    assert predicted - shared <= total <= predicted - shared + small
