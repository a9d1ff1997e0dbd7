"""The memory of a torch tensor as numpy sees it, whatever its dtype.

numpy knows neither bfloat16 nor the float8s. Copying needs no meaning, only the size of an element: integers of that
size stand in.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name without the prefix."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name from a checkpoint that was read (its names are checked there)."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype of torch: {name}")
    return dtype


def array_of(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor on the CPU, in its shape and strides; integers stand for its elements."""
    array: NDArray[Any] = tensor.detach().view(_UNITS[tensor.itemsize]).numpy()
    return array


def bytes_of(tensor: Tensor) -> memoryview:
    """The row-major bytes of a tensor; its own memory if that is on the CPU and contiguous, otherwise a copy."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return array_of(plain).reshape(-1).view(np.uint8).data
