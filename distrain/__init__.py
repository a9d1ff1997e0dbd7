"""Distrain: train large models on GPU clusters, and keep the run alive."""

from pathlib import Path as _Path

__version__ = "0.1.0"

if not (_Path(__file__).parent / "launch").is_dir():  # a source checkout: the rooms are siblings
    __path__.append(str(_Path(__file__).resolve().parent.parent))
