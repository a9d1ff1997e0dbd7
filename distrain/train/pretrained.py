"""Weights to start from: a Llama model in Hugging Face's layout, of which each rank reads what it holds."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from distrain.core.config import ModelConfig
from distrain.core.errors import DataError, DistrainError, Problem
from distrain.core.vocabulary import PRESETS

if TYPE_CHECKING:
    from distrain.checkpoint.convert.hf import HuggingFaceSource


def pretrained(model: ModelConfig) -> "HuggingFaceSource":
    """The model at ``model.weights``, of the sizes that ``model`` says.

    Raises:
        ConfigError: it is not there, or another model.
        DataError: it is damaged.
    """
    from distrain.checkpoint.convert.hf import HuggingFaceSource

    return HuggingFaceSource(Path(model.weights))


def check_pretrained(model: ModelConfig) -> list[Problem]:
    """Why training cannot start from ``model.weights``, if it is to; all sizes in which the two models differ."""
    if not model.weights or model.preset not in PRESETS:
        return []
    folder = Path(model.weights)
    try:
        from distrain.checkpoint.convert.hf import is_llama  # with torch, which a launcher can do without

        if not is_llama(folder):
            raise DataError(
                "model.weights is no Llama model in Hugging Face's layout",
                got=model.weights,
                allowed="a folder with config.json (model_type llama) and safetensors files",
            )
        found, wanted = pretrained(model).shape, model.shape()
    except DistrainError as error:
        return list(error.problems)
    return [
        Problem(
            f"model.{field.name} is not that of model.weights",
            got=f"{getattr(wanted, field.name)}",
            allowed=f"{getattr(found, field.name)}",
            hint=f"--set model.{field.name}={getattr(found, field.name)}",
        )
        for field in fields(found)
        if getattr(found, field.name) != getattr(wanted, field.name)
    ]
