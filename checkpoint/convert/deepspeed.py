"""DeepSpeed's universal checkpoints (UCP, 2406.18820): a folder for each parameter, a file for each of its states::

    zero/<parameter>/{fp32, exp_avg, exp_avg_sq}.pt, step.pt
    zero/optimizer_state.pt          options of the parameter groups
    mp_rank_00_model_states.pt       what the engine wants to know besides

Whole tensors under the model's own names, like ours; parameters are float32 there, whatever the model computes with.
Files are pickles: they are read as data only. The engine loads such a folder with ``load_universal_checkpoint``; it
says nothing about the data loader and the learning-rate schedule.
"""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrain.core.errors import Problem, raise_if

from ..errors import DamageError, storage_errors
from ..safe_state import decode, encode
from ..torch_memory import dtype_name
from ..untrusted import Json
from .form import MODEL, OPTIMIZER, TRAIN, Renamed, Source, TensorInfo, optimizer_state, parameter

ZERO = "zero"
WEIGHT, STEP, PARAM = "fp32", "step", "param"
OPTIONS, ENGINE = "optimizer_state.pt", "mp_rank_00_model_states.pt"
VERSION = "0.19.8"
"""of DeepSpeed, whose layout this is"""


class UniversalSource:
    """A folder in the universal layout."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self.tensors: dict[str, TensorInfo] = {}
        steps: dict[str, int] = {}
        for path in sorted((folder / ZERO).glob("*/*.pt")):
            owner, key = path.parent.name, path.stem
            if key == STEP:
                steps[owner] = int(_load(path))
                continue
            name = f"{MODEL}.{owner}" if key == WEIGHT else f"{OPTIMIZER}.state.{owner}.{key}"
            tensor = _tensor(path)
            self._files[name] = path
            self.tensors[name] = TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape))
        self.step = max(steps.values(), default=0)
        values = {owner: {"step": float(step)} for owner, step in steps.items()}
        objects = {OPTIMIZER: {"values": values, "param_groups": []}} if values else {}
        self.objects: Mapping[str, Json] = {name: encode(value, name=name) for name, value in objects.items()}
        others = [*sorted(folder.glob("*.pt")), folder / ZERO / OPTIONS]
        self.left_out = tuple(str(path.relative_to(folder)) for path in others if path.exists())

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """File by file."""
        for name, path in self._files.items():
            yield name, _tensor(path).contiguous()


def write_universal(source: Source, folder: Path) -> tuple[str, ...]:
    """Write parameters and optimizer state of ``source``; returns the names of what has no place there.

    DeepSpeed pairs parameter groups by their position, so the optimizer that loads this has as many as ours had.
    """
    places = {name: place for name in source.tensors if (place := _place(name))}
    raise_if(
        [Problem(f"{name} cannot be the name of a folder") for name in places if "/" in name or ".." in name]
    )
    objects = {
        name: decode(value, name=name) for name, value in source.objects.items() if name in (OPTIMIZER, TRAIN)
    }
    zero = folder / ZERO
    with storage_errors(f"write {zero}"):
        zero.mkdir()
        for name, tensor in Renamed(source, {name: name for name in places}).read():
            owner, key = places[name]
            (zero / owner).mkdir(exist_ok=True)
            torch.save({PARAM: tensor.float().clone()}, zero / owner / f"{key}.pt")
        for owner, step in _steps(objects, places.values()).items():
            torch.save(torch.tensor(float(step)), zero / owner / f"{STEP}.pt")
        torch.save({"ds_version": VERSION, "param_groups": _groups(objects)}, zero / OPTIONS)
        engine = {
            "dp_world_size": 1,
            "mp_world_size": 1,
            "global_steps": source.step,
            "skipped_steps": 0,
            "module": {},
        }
        torch.save(engine, folder / ENGINE)
    return tuple(
        name for name in (*source.tensors, *source.objects) if name not in places and name not in objects
    )


def _steps(objects: Mapping[str, Any], places: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Steps that the optimizer has done, by parameter: all parameters with moments."""
    owners = {owner for owner, key in places if key != WEIGHT}
    values = objects.get(OPTIMIZER, {}).get("values", {})
    everywhere = {STEP: objects[TRAIN][STEP]} if TRAIN in objects else {}
    found = {owner: values.get(owner, everywhere) for owner in owners}
    return {owner: entries[STEP] for owner, entries in sorted(found.items()) if STEP in entries}


def _groups(objects: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Options of the parameter groups; at least one, as an engine wants it."""
    groups = objects.get(OPTIMIZER, {}).get("param_groups", [])
    return [{key: value for key, value in group.items() if key != "params"} for group in groups] or [{}]


def _place(name: str) -> tuple[str, str] | None:
    """Folder and stem of the file of a tensor."""
    if state := optimizer_state(name):
        return state
    owner = parameter(name)
    return (owner, WEIGHT) if owner else None


def _tensor(path: Path) -> Tensor:
    """The whole tensor in a file; its bytes are read when they are used."""
    content = _load(path)
    if not isinstance(content, dict) or not isinstance(content.get(PARAM), Tensor):
        raise DamageError(
            f"{path} holds no whole tensor", got=type(content).__name__, allowed="{'param': a tensor, ...}"
        )
    tensor: Tensor = content[PARAM]
    return tensor


def _load(path: Path) -> Any:
    try:
        with storage_errors(f"read {path}"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DamageError(f"{path} cannot be read as plain tensors", got=str(error)[:300]) from error
