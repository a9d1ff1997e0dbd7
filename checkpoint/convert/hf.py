"""Hugging Face's layout of Llama models: their names, and the config that tells transformers what they are.

Only names differ. Both sides turn the two halves of a head by the rotary angles (Meta's original files turn pairs of
neighbours), so queries and keys are stored alike; tests/checkpoint compares logits.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from torch import Tensor

from distrain.core.errors import ConfigError, Problem, raise_if
from distrain.core.vocabulary import ModelShape

from ..untrusted import Json, integer, number, parse, table
from .form import MODEL, Renamed, Source, TensorInfo, parameter
from .safetensors import SHARD_BYTES, SafetensorsSource, write_safetensors

CONFIG = "config.json"

T = TypeVar("T")

_EDGES = MappingProxyType(
    {
        "embed.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
)
_LAYER = MappingProxyType(
    {
        "attn_norm.weight": "input_layernorm.weight",
        "attn.wq.weight": "self_attn.q_proj.weight",
        "attn.wk.weight": "self_attn.k_proj.weight",
        "attn.wv.weight": "self_attn.v_proj.weight",
        "attn.wo.weight": "self_attn.o_proj.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "mlp.w_gate.weight": "mlp.gate_proj.weight",
        "mlp.w_up.weight": "mlp.up_proj.weight",
        "mlp.w_down.weight": "mlp.down_proj.weight",
    }
)
_OURS = re.compile(r"layers\.([0-9]+)\.(.+)")
_THEIRS = re.compile(r"model\.layers\.([0-9]+)\.(.+)")


def hf_name(name: str) -> str | None:
    """Hugging Face's name for a parameter of our decoder."""
    match = _OURS.fullmatch(name)
    if match is None:
        return _EDGES.get(name)
    inner = _LAYER.get(match[2])
    return inner and f"model.layers.{match[1]}.{inner}"


def our_name(name: str) -> str | None:
    """The reverse of ``hf_name``."""
    match = _THEIRS.fullmatch(name)
    if match is None:
        return {theirs: ours for ours, theirs in _EDGES.items()}.get(name)
    inner = {theirs: ours for ours, theirs in _LAYER.items()}.get(match[2])
    return inner and f"layers.{match[1]}.{inner}"


def is_llama(folder: Path) -> bool:
    """Whether ``folder`` holds a model of the Llama family in Hugging Face's layout."""
    return (folder / CONFIG).is_file() and _read_config(folder).get("model_type") == "llama"


class HuggingFaceSource:
    """A Llama model in Hugging Face's layout, under our names."""

    def __init__(self, folder: Path) -> None:
        config = _read_config(folder)
        self.shape = shape_of(config)
        files = SafetensorsSource(folder)
        names = {name: ours for name in files.tensors if (ours := our_name(name))}
        raise_if(_misfits({names[name]: files.tensors[name] for name in names}, self.shape, may_be_tied=True))
        self._files, self._theirs = files, {ours: name for name, ours in names.items()}
        self._inner = Renamed(
            files, {name: f"{MODEL}.{ours}" for name, ours in names.items()}, keep_objects=False
        )
        self._tied = "head.weight" not in names.values()
        self.objects: Mapping[str, Json] = {}
        self.left_out = self._inner.left_out
        self.step = self._inner.step

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """With the head, even where it is the embedding."""
        return dict(self._with_head(self._inner.tensors.items()))

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """In the order of the files."""
        return self._with_head(self._inner.read())

    def parameter(self, name: str) -> Tensor:
        """One of our decoder's parameters, whole, on the CPU.

        Raises:
            ConfigError: the model has no parameter of this name.
        """
        stored = "embed.weight" if self._tied and name == "head.weight" else name
        if stored not in self._theirs:
            raise ConfigError(
                "the model in Hugging Face's layout has no such parameter",
                got=name,
                allowed=", ".join(sorted(self._theirs)),
            )
        return self._files.tensor(self._theirs[stored])

    def _with_head(self, entries: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        for name, value in entries:
            yield name, value
            if self._tied and name == f"{MODEL}.embed.weight":
                yield f"{MODEL}.head.weight", value


def write_hf(
    source: Source, folder: Path, *, shape: ModelShape | None, shard_bytes: int = SHARD_BYTES
) -> tuple[str, ...]:
    """Write the model's parameters as transformers reads them; returns the names of what has no place there.

    Raises:
        ConfigError: ``source`` holds no model of this ``shape``, or transformers' Llama has no such model.
    """
    if shape is None:
        raise ConfigError(
            "the weights alone do not say how many heads the model has",
            allowed="the config that it was trained with",
            hint="--config run.toml",
        )
    ours = {name: bare for name in source.tensors if (bare := parameter(name))}
    tensors = {bare: source.tensors[name] for name, bare in ours.items()}
    raise_if([*_unlike_llama(shape), *_misfits(tensors, shape, may_be_tied=False)])
    chosen = Renamed(source, {name: hf_name(bare) or "" for name, bare in ours.items()}, keep_objects=False)
    write_safetensors(chosen, folder, shard_bytes=shard_bytes)
    document = config_of(shape, dtype=tensors["embed.weight"].dtype)
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
    return chosen.left_out


def shape_of(config: Mapping[str, Json]) -> ModelShape:
    """The sizes in a config.json of a Llama model.

    Raises:
        DamageError: a size is missing or none.
        ConfigError: it asks for something that our decoder does not do; lists all.
    """

    def size(name: str, default: int | None = None) -> int:
        return integer(config.get(name) or default, f"{CONFIG}: {name}", low=1)

    rope = table(config.get("rope_parameters") or {}, "rope_parameters")
    scaling = table(config.get("rope_scaling") or rope, "rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    heads, width = size("num_attention_heads"), size("hidden_size")
    wanted = (
        ("rope scaling", kind, "default"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("mlp_bias", config.get("mlp_bias", False), False),
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("head_dim", config.get("head_dim") or width / heads, width / heads),
    )
    raise_if(
        [
            Problem(f"the decoder has no such {what}", got=str(got), allowed=str(allowed))
            for what, got, allowed in wanted
            if got != allowed
        ]
    )
    return ModelShape(
        d_model=width,
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", heads),
        d_ffn=size("intermediate_size"),
        vocab_size=size("vocab_size"),
        rope_theta=number(theta, "rope_theta"),
        norm_eps=number(config.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
    )


def config_of(shape: ModelShape, *, dtype: str) -> dict[str, Json]:
    """The config.json of a model of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_ffn,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def _read_config(folder: Path) -> Mapping[str, Json]:
    return table(parse((folder / CONFIG).read_bytes(), CONFIG), CONFIG)


def _unlike_llama(shape: ModelShape) -> list[Problem]:
    found = {"parallel_block": shape.parallel_block, "window": shape.window}
    return [
        Problem(f"transformers' Llama has no {name}", got=str(value))
        for name, value in found.items()
        if value
    ]


def _misfits(tensors: Mapping[str, TensorInfo], shape: ModelShape, *, may_be_tied: bool) -> list[Problem]:
    """In what ``tensors`` are not the parameters of a model of ``shape``; a tied one has no head of its own."""
    expected = dict(_shapes(shape))
    problems = [
        Problem(f"{name} is missing", allowed=f"shape {size}")
        for name, size in expected.items()
        if name not in tensors and not (may_be_tied and name == "head.weight")
    ]
    for name, info in tensors.items():
        if name not in expected:
            problems.append(Problem(f"{name} is no parameter of this model", got=f"shape {info.shape}"))
        elif info.shape != expected[name]:
            problems.append(
                Problem(f"{name} has another shape", got=str(info.shape), allowed=str(expected[name]))
            )
    return problems


def _shapes(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters of our decoder with their shapes."""
    width, ffn, keys = shape.d_model, shape.d_ffn, shape.num_kv_heads * shape.head_dim
    for i in range(shape.num_layers):
        yield f"layers.{i}.attn_norm.weight", (width,)
        yield f"layers.{i}.mlp_norm.weight", (width,)
        for name, size in (
            ("wq", (width, width)),
            ("wk", (keys, width)),
            ("wv", (keys, width)),
            ("wo", (width, width)),
        ):
            yield f"layers.{i}.attn.{name}.weight", size
        for name, size in (("w_gate", (ffn, width)), ("w_up", (ffn, width)), ("w_down", (width, ffn))):
            yield f"layers.{i}.mlp.{name}.weight", size
    yield "embed.weight", (shape.vocab_size, width)
    yield "norm.weight", (width,)
    yield "head.weight", (shape.vocab_size, width)
