"""safetensors files, one or several with an index, read and written tensor by tensor.

The format is a length, a JSON header and the data. The library of that name wants all tensors of a file in memory
to write it; this needs one at a time. Objects travel as JSON in the header's metadata, under OBJECTS.
"""

import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from distrain.core.errors import ConfigError, Problem, raise_if

from ..errors import DamageError, storage_errors
from ..layout import DTYPES
from ..torch_memory import bytes_of, dtype_of
from ..untrusted import Json, array, integer, integers, parse, record, refuse, table, text
from .form import Source, TensorInfo

INDEX = "model.safetensors.index.json"
OBJECTS, STEP = "distrain.objects", "distrain.step"
SHARD_BYTES = 5 * 10**9
"""data of one file, as Hugging Face cuts them"""

_HEADER_LIMIT_BYTES = 100_000_000
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "bool": "BOOL",
        "uint8": "U8",
        "int8": "I8",
        "uint16": "U16",
        "int16": "I16",
        "uint32": "U32",
        "int32": "I32",
        "uint64": "U64",
        "int64": "I64",
        "float8_e4m3fn": "F8_E4M3",
        "float8_e4m3fnuz": "F8_E4M3FNUZ",
        "float8_e5m2": "F8_E5M2",
        "float8_e5m2fnuz": "F8_E5M2FNUZ",
        "float8_e8m0fnu": "F8_E8M0",
        "float16": "F16",
        "bfloat16": "BF16",
        "float32": "F32",
        "float64": "F64",
        "complex64": "C64",
    }
)
_DTYPES = {theirs: ours for ours, theirs in _NAMES.items()}


class SafetensorsSource:
    """One file, or all of a folder (those of its index, if it has one)."""

    def __init__(self, path: Path) -> None:
        self._files = {file: _read_header(file) for file in _files_of(path)}
        self.tensors: dict[str, TensorInfo] = {}
        for file, header in self._files.items():
            for name, (info, _) in header.tensors.items():
                if name in self.tensors:
                    raise DamageError(f"{name} is in two files", got=str(file))
                self.tensors[name] = info
        metadata = {key: value for header in self._files.values() for key, value in header.metadata.items()}
        self.objects: Mapping[str, Json] = table(
            parse(metadata.get(OBJECTS, "{}").encode(), OBJECTS), OBJECTS
        )
        self.left_out = tuple(key for key in metadata if key not in (OBJECTS, STEP, "format"))
        self.step = integer(parse(metadata.get(STEP, "0").encode(), STEP), STEP, high=10**15)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """File by file."""
        for header in self._files.values():
            for name in header.tensors:
                yield name, self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """One of the tensors, whole, on the CPU."""
        path, header = next((path, header) for path, header in self._files.items() if name in header.tensors)
        info, start = header.tensors[name]
        found = torch.empty(info.shape, dtype=dtype_of(info.dtype))
        with storage_errors(f"read {path}"), path.open("rb") as file:
            file.seek(start)
            if file.readinto(bytes_of(found)) != info.nbytes:
                raise DamageError(f"{path} is cut off within {name}")
        return found


def write_safetensors(source: Source, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``source`` into ``folder``: model.safetensors, or several files and their index."""
    _check_dtypes(source.tensors)
    shards = _shards(source.tensors, shard_bytes)
    metadata = {"format": "pt", STEP: str(source.step)}
    if source.objects:
        metadata[OBJECTS] = json.dumps(source.objects, sort_keys=True)
    placed: dict[str, tuple[Path, int]] = {}
    for name, shard in shards.items():
        placed |= _begin_file(folder / name, shard, metadata)
        metadata = {"format": "pt"}
    for name, tensor in source.read():
        path, start = placed[name]
        with storage_errors(f"write {path}"), path.open("r+b") as file:
            file.seek(start)
            file.write(bytes_of(tensor))
    if len(shards) > 1:
        weight_map = {name: path.name for name, (path, _) in sorted(placed.items())}
        total = sum(info.nbytes for info in source.tensors.values())
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n")


class _Header:
    def __init__(self, tensors: Mapping[str, tuple[TensorInfo, int]], metadata: Mapping[str, str]) -> None:
        self.tensors = tensors
        """info and first byte in the file"""
        self.metadata = metadata


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / INDEX).exists():
        data = (path / INDEX).read_bytes()
        index = table(table(parse(data, INDEX), INDEX).get("weight_map"), f"{INDEX}: weight_map")
        names = sorted({text(name, f"{INDEX}: file") for name in index.values()})
        if outside := [name for name in names if Path(name).name != name]:
            refuse(f"{INDEX}: file", outside[0], "a name without folders")
        return [path / name for name in names]
    if not (found := sorted(path.glob("*.safetensors"))):
        raise ConfigError(f"there are no safetensors files in {path}")
    return found


def _read_header(path: Path) -> _Header:
    with storage_errors(f"read {path}"), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER_LIMIT_BYTES, size - 8):
            refuse(f"{path}: length of the header", length, f"at most {min(_HEADER_LIMIT_BYTES, size - 8)}")
        header = table(parse(file.read(length), str(path)), str(path))
    tensors = {
        name: _entry(name, fields, data_start=8 + length, end=size)
        for name, fields in header.items()
        if name != "__metadata__"
    }
    metadata = table(header.get("__metadata__", {}), f"{path}: metadata")
    if not all(isinstance(value, str) for value in metadata.values()):
        refuse(f"{path}: metadata", metadata, "strings")
    return _Header(dict(sorted(tensors.items(), key=lambda entry: entry[1][1])), metadata)


def _entry(name: str, value: Json, *, data_start: int, end: int) -> tuple[TensorInfo, int]:
    fields = record(value, name, "dtype", "shape", "data_offsets")
    if fields["dtype"] not in _DTYPES:
        refuse(f"{name}: dtype", fields["dtype"], ", ".join(_DTYPES))
    info = TensorInfo(_DTYPES[fields["dtype"]], integers(fields["shape"], f"{name}: shape"))
    first, last = integers(
        array(fields["data_offsets"], f"{name}: data_offsets", length=2), f"{name}: offsets"
    )
    if last - first != info.nbytes or data_start + last > end:
        refuse(f"{name}: data_offsets", [first, last], f"{info.nbytes} bytes within the file")
    return info, data_start + first


def _check_dtypes(tensors: Mapping[str, TensorInfo]) -> None:
    raise_if(
        [
            Problem(f"safetensors has no dtype for {name}", got=info.dtype, allowed=", ".join(_NAMES))
            for name, info in tensors.items()
            if info.dtype not in _NAMES
        ]
    )


def _shards(tensors: Mapping[str, TensorInfo], shard_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """Tensors by file, in their order."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _begin_file(
    path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> dict[str, tuple[Path, int]]:
    """Write the header and reserve the rest; where each tensor goes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    # Descending size of elements, as readers of the format expect, keeps every tensor aligned.
    ordered = sorted(tensors.items(), key=lambda entry: (-DTYPES[entry[1].dtype], entry[0]))
    end, starts = 0, {}
    for name, info in ordered:
        starts[name] = end
        header[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += prod(info.shape) * DTYPES[info.dtype]
    document = json.dumps(header).encode()
    document += b" " * (-len(document) % 8)
    with storage_errors(f"write {path}"), path.open("wb") as file:
        file.write(len(document).to_bytes(8, "little") + document)
        file.truncate(8 + len(document) + end)
    return {name: (path, 8 + len(document) + start) for name, start in starts.items()}
