"""The decoder: its sizes, its weights and its two MegaScale options."""

from dataclasses import replace

import pytest
import torch

from distrain.core.vocabulary import PRESETS, ModelShape
from distrain.train.model import Block, Decoder, Rotary, rotate
from distrain.train.weights import initial_value, materialize

SMALL = ModelShape(d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ffn=48, vocab_size=64)
CPU = torch.device("cpu")


def built(shape: ModelShape, seed: int = 3) -> Decoder:
    with torch.device("meta"):
        model = Decoder(shape)
    materialize(model, device=CPU, seed=seed, num_layers=shape.num_layers)
    return model


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("parallel_block", [False, True])
def test_the_formula_counts_what_the_model_has(name: str, parallel_block: bool) -> None:
    shape = replace(PRESETS[name], parallel_block=parallel_block)
    with torch.device("meta"):
        model = Decoder(shape)
    assert sum(param.numel() for param in model.parameters()) == shape.num_params


# Published counts of the Llama and GPT-3 families; a preset's name promises no more than its order.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("125m", 0.134),
        ("1.3b", 1.35),
        ("7b", 6.738),
        ("13b", 13.016),
        ("30b", 32.529),
        ("65b", 65.286),
        ("175b", 175.2),
    ],
)
def test_presets_have_the_size_of_their_name(name: str, billions: float) -> None:
    assert PRESETS[name].num_params / 1e9 == pytest.approx(billions, rel=0.01)


def test_stages_put_together_are_the_whole_model() -> None:
    whole = built(SMALL)
    with torch.device("meta"):
        stages = [Decoder(SMALL, first_layer=0, last_layer=1), Decoder(SMALL, first_layer=1, last_layer=2)]
    for stage in stages:
        materialize(stage, device=CPU, seed=3, num_layers=SMALL.num_layers)
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(stages[1](stages[0](ids)), whole(ids), rtol=0, atol=0)
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())


def test_a_seed_gives_the_same_weights_and_another_seed_others() -> None:
    size = torch.Size((8, 4))
    first = initial_value("layers.0.attn.wq.weight", size, device=CPU, seed=1, num_layers=2)
    again = initial_value("layers.0.attn.wq.weight", size, device=CPU, seed=1, num_layers=2)
    assert torch.equal(first, again)
    for name, seed in (("layers.0.attn.wq.weight", 2), ("layers.1.attn.wq.weight", 1)):
        assert not torch.equal(first, initial_value(name, size, device=CPU, seed=seed, num_layers=2))


def test_a_token_sees_nothing_behind_itself() -> None:
    model, ids = built(SMALL), torch.arange(20).view(1, 20)
    changed = ids.clone()
    changed[0, 12:] = 7
    torch.testing.assert_close(model(ids)[:, :12], model(changed)[:, :12])
    assert not torch.allclose(model(ids)[:, 12:], model(changed)[:, 12:])


def test_a_window_of_attention_ends_where_it_says() -> None:
    """With one layer and a window of 4, token 10 sees tokens 7 to 10 and no others."""
    model = built(replace(SMALL, num_layers=1, window=4))
    ids = torch.arange(16).view(1, 16)
    seen = []
    for position in range(16):
        changed = ids.clone()
        changed[0, position] = 60
        if not torch.equal(model(ids)[0, 10], model(changed)[0, 10]):
            seen.append(position)
    assert seen == [7, 8, 9, 10]


def test_a_window_longer_than_the_sequence_changes_nothing() -> None:
    ids = torch.arange(16).view(1, 16)
    torch.testing.assert_close(built(replace(SMALL, window=16))(ids), built(SMALL)(ids))


def test_the_parallel_block_adds_both_branches_of_one_norm() -> None:
    block = built(replace(SMALL, parallel_block=True)).layers["0"]
    assert isinstance(block, Block)
    x = torch.randn(2, 6, SMALL.d_model, generator=torch.Generator().manual_seed(0))
    normed = block.attn_norm(x)
    torch.testing.assert_close(block(x), x + block.attn(normed) + block.mlp(normed))


def test_grouped_heads_equal_repeated_ones() -> None:
    """Two KV heads for four query heads attend as four KV heads whose weights are pairwise equal."""
    grouped, full = built(SMALL), built(replace(SMALL, num_kv_heads=4))
    with torch.no_grad():
        for name, param in full.named_parameters():
            source: torch.Tensor = dict(grouped.named_parameters())[name]
            if name.endswith(("wk.weight", "wv.weight")):
                heads = source.view(2, SMALL.head_dim, -1).repeat_interleave(2, dim=0)
                source = heads.reshape(param.shape)
            param.copy_(source)
    ids = torch.arange(16).view(1, 16)
    torch.testing.assert_close(grouped(ids), full(ids))


def test_positions_are_relative() -> None:
    """Scores of rotated queries and keys depend on distances only, not on where the window of tokens starts."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 6, SMALL.head_dim, generator=generator, dtype=torch.float64)
    cos, sin, _ = Rotary(SMALL).tables(16, q)
    scores = [
        rotate(q, cos[at], sin[at]) @ rotate(k, cos[at], sin[at]).mT for at in (slice(0, 6), slice(9, 15))
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-12, atol=1e-12)
