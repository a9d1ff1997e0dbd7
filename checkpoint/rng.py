"""The random states of a process: Python's, numpy's, torch's on the CPU and on each of its GPUs."""

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """All random states, as plain values and arrays that ``safe_state`` knows."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state().numpy(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = [each.numpy() for each in torch.cuda.get_rng_state_all()]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Go on with the random numbers that would have followed ``state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.from_numpy(np.array(state["torch"], dtype=np.uint8)))
    for index, each in enumerate(state.get("cuda", [])):
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(torch.from_numpy(np.array(each, dtype=np.uint8)), index)
