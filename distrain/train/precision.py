"""What ``train.dtype`` means: the type of weights and gradients, and that of matrix products."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""of weights and gradients, by ``train.dtype``: bfloat16 means autocast around float32 weights"""


def products(dtype: str, device: torch.device) -> torch.autocast:
    """Context for forward and backward under ``train.dtype``."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
