"""Llama models in Hugging Face's layout compute the same logits there and here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distrain.checkpoint.convert import convert
from distrain.checkpoint.convert.hf import HuggingFaceSource, config_of, hf_name, our_name, shape_of
from distrain.checkpoint.convert.run import open_source
from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.torch_memory import array_of, dtype_name
from distrain.core.errors import ConfigError
from distrain.core.vocabulary import ModelShape
from distrain.train.model import Decoder
from helpers.checkpoints import whole, write_checkpoint

SHAPE = ModelShape(
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    d_ffn=48,
    vocab_size=50,
    rope_theta=500.0,
    norm_eps=1e-4,
)


def decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model


def save(root: Path, model: Decoder) -> Path:
    shards = [
        whole(f"model.{name}", dtype_name(tensor.dtype), array_of(tensor))
        for name, tensor in model.state_dict().items()
    ]
    return write_checkpoint(
        root, [[*shards, whole("optimizer.state.norm.weight.exp_avg", "float32", shards[0][1])]]
    )


def llama_logits(weights: dict[str, Tensor], config: dict[str, object], ids: Tensor) -> Tensor:
    """A Llama by the formulas of the papers and the names and conventions of a Hugging Face checkpoint.

    Written without our decoder: rotation by complex numbers over (i, i + half), attention by explicit softmax.
    """
    heads, groups = int(str(config["num_attention_heads"])), int(str(config["num_key_value_heads"]))
    eps, theta = float(str(config["rms_norm_eps"])), float(str(config["rope_theta"]))
    (num_tokens,) = ids.shape
    x = weights["model.embed_tokens.weight"][ids]
    head_dim = x.shape[-1] // heads
    half = head_dim // 2

    def norm(y: Tensor, name: str) -> Tensor:
        return y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weights[name]

    def turned(y: Tensor) -> Tensor:  # [tokens, heads, head_dim]
        angles = torch.arange(num_tokens)[:, None] * theta ** (-torch.arange(half) / half)
        numbers = (
            torch.complex(y[..., :half], y[..., half:])
            * torch.polar(torch.ones_like(angles), angles)[:, None]
        )
        return torch.cat((numbers.real, numbers.imag), dim=-1)

    for layer in range(int(str(config["num_hidden_layers"]))):
        prefix = f"model.layers.{layer}."
        y = norm(x, prefix + "input_layernorm.weight")
        q, k, v = (
            (y @ weights[f"{prefix}self_attn.{name}_proj.weight"].T).view(num_tokens, -1, head_dim)
            for name in "qkv"
        )
        q, k = turned(q), turned(k)
        out = torch.empty_like(q)
        for head in range(heads):
            group = head // (heads // groups)
            scores = q[:, head] @ k[:, group].T / head_dim**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
            out[:, head] = scores.softmax(-1) @ v[:, group]
        x = x + out.reshape(num_tokens, -1) @ weights[prefix + "self_attn.o_proj.weight"].T
        y = norm(x, prefix + "post_attention_layernorm.weight")
        gate, up = (y @ weights[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[prefix + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


def read(path: Path) -> dict[str, Tensor]:
    return dict(open_source(path)[1].read())


def raw(folder: Path) -> dict[str, Tensor]:
    """As it lies in the files, under Hugging Face's names."""
    from distrain.checkpoint.convert.safetensors import SafetensorsSource

    return dict(SafetensorsSource(folder).read())


IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 49])


def test_our_models_have_the_same_logits_by_hugging_faces_names_and_conventions(tmp_path: Path) -> None:
    model = decoder()
    save(tmp_path / "run", model)
    done = convert(tmp_path / "run", tmp_path / "hf", to="hf", shape=SHAPE, shard_bytes=20_000)
    assert done.left_out == ("optimizer.state.norm.weight.exp_avg",)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["torch_dtype"] == "float32"
    with torch.no_grad():
        ours = model(IDS[None])[0]
        theirs = llama_logits(raw(tmp_path / "hf"), config, IDS)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert ours.std() > 0.5


def test_models_that_distrain_train_saved_are_found_too(tmp_path: Path) -> None:
    weights = decoder().state_dict()
    shards = [whole(f"train.model.{name}", "float32", array_of(tensor)) for name, tensor in weights.items()]
    write_checkpoint(
        tmp_path / "run", [[*shards, whole("train.exp_avg.norm.weight", "float32", shards[0][1])]]
    )
    done = convert(tmp_path / "run", tmp_path / "hf", to="hf", shape=SHAPE)
    assert done.left_out == ("train.exp_avg.norm.weight",)
    assert torch.equal(raw(tmp_path / "hf")["lm_head.weight"], weights["head.weight"])


def test_a_model_from_hugging_face_computes_here_what_it_computed_there(tmp_path: Path) -> None:
    convert(save(tmp_path / "run", decoder()), tmp_path / "hf", to="hf", shape=SHAPE)
    done = convert(tmp_path / "hf", tmp_path / "ours", to="distrain")
    assert done.source_format == "hf"
    model = decoder(seed=1)
    model.load_state_dict(
        {name.removeprefix("model."): tensor for name, tensor in read(tmp_path / "ours").items()}
    )
    for name, parameter in decoder().state_dict().items():
        assert torch.equal(model.state_dict()[name], parameter), name


def test_a_model_whose_head_is_its_embedding_gets_a_head(tmp_path: Path) -> None:
    convert(save(tmp_path / "run", decoder()), tmp_path / "hf", to="hf", shape=SHAPE)
    library = pytest.importorskip("safetensors.torch")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = library.load_file(file)
    del tensors["lm_head.weight"]
    library.save_file(tensors, file, metadata={"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "ours", to="distrain")
    found = read(tmp_path / "ours")
    assert torch.equal(found["model.head.weight"], found["model.embed.weight"])
    assert len(found) == len(decoder().state_dict())
    source = HuggingFaceSource(tmp_path / "hf")
    assert torch.equal(source.parameter("head.weight"), found["model.embed.weight"])
    with pytest.raises(ConfigError, match=r"layers\.2\.attn\.wq\.weight"):
        source.parameter("layers.2.attn.wq.weight")


def test_names_map_one_to_one() -> None:
    names = list(Decoder(SHAPE).state_dict())
    theirs = [hf_name(name) for name in names]
    assert [our_name(name) for name in theirs if name] == names and len(set(theirs)) == len(names)
    assert hf_name("layers.0.attn.bias") is None and our_name("model.layers.0.self_attn.q_proj.bias") is None


def test_a_config_and_a_shape_say_the_same() -> None:
    assert shape_of(config_of(SHAPE, dtype="float32")) == SHAPE
    newer = config_of(SHAPE, dtype="float32") | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}
    }
    assert shape_of(newer).rope_theta == 7.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 64}, "head_dim"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"rope_theta": "fast"}, "rope_theta"),
        ({"num_hidden_layers": 3}, "layers.2.attn_norm.weight is missing"),
        ({"intermediate_size": 64}, "another shape"),
    ],
)
def test_what_our_decoder_does_not_do_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    convert(save(tmp_path / "run", decoder()), tmp_path / "hf", to="hf", shape=SHAPE)
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises((ConfigError, DamageError)) as caught:
        convert(tmp_path / "hf", tmp_path / "ours", to="distrain")
    assert words in str(caught.value)


def test_models_that_are_no_llama_are_refused_or_keep_their_names(tmp_path: Path) -> None:
    save(tmp_path / "run", decoder())
    for shape, words in (
        (replace(SHAPE, parallel_block=True), "parallel_block"),
        (replace(SHAPE, window=5), "window"),
        (replace(SHAPE, d_ffn=64), "another shape"),
        (replace(SHAPE, num_layers=1), "no parameter of this model"),
    ):
        with pytest.raises(ConfigError) as caught:
            convert(tmp_path / "run", tmp_path / "hf", to="hf", shape=shape)
        assert words in str(caught.value)
    convert(tmp_path / "run", tmp_path / "st", to="safetensors")
    (tmp_path / "st" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert convert(tmp_path / "st", tmp_path / "ours", to="distrain").source_format == "safetensors"
