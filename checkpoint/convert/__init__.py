"""Checkpoints of other projects, to and from ours: safetensors, Hugging Face, torch's DCP, DeepSpeed universal."""

from .run import FORMATS, Converted, convert, total_bytes

__all__ = ["FORMATS", "Converted", "convert", "total_bytes"]
