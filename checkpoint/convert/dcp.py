"""torch.distributed.checkpoint's own format, through its own reader and writer.

That format keeps its metadata, and every value that is no tensor, as pickles, whose readers run what their author
wrote. Here the metadata is unpickled by a reader that knows the few classes it is made of and refuses all else, and
values are loaded as data only.
"""

import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    filesystem,
    metadata,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem

from ..errors import DamageError, storage_errors
from ..safe_state import decode, encode
from ..torch_memory import dtype_name, dtype_of
from ..untrusted import Json
from .form import Source, TensorInfo, batches

METADATA = ".metadata"
PART_BYTES = 512 << 20
"""of one file, all of which torch's writer keeps in memory"""


_NOT_READABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
)
"""what unpickling and torch's reader raise on what they do not understand"""


class DcpSource:
    """A folder that torch's FileSystemWriter has written."""

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(folder)
        entries = self._reader.read_metadata().state_dict_metadata
        sharded = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(dtype_name(sharded[name].properties.dtype), tuple(sharded[name].size))
            for name in sorted(sharded, key=self._place)
        }
        self.objects: Mapping[str, Json] = self._load_objects(
            [name for name in entries if name not in sharded]
        )
        self.left_out: tuple[str, ...] = ()
        step = decode(self.objects.get("step", 0))
        self.step = step if type(step) is int and step >= 0 else 0

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """In the order of the files."""
        for names in batches(self.tensors):
            state = {
                n: torch.empty(self.tensors[n].shape, dtype=dtype_of(self.tensors[n].dtype)) for n in names
            }
            self._load(state)
            for name in names:
                yield name, state.pop(name)

    def _place(self, name: str) -> tuple[str, int]:
        data = self._reader.read_metadata()
        entry = data.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        first = MetadataIndex(name, entry.chunks[0].offsets) if entry.chunks else None
        info = data.storage_data.get(first)
        return (info.relative_path, info.offset) if info else ("", 0)

    def _load_objects(self, names: list[str]) -> dict[str, Json]:
        state: dict[str, Any] = dict.fromkeys(names)
        if names:
            self._load(state)
        return {name: encode(value, name=name) for name, value in state.items()}

    def _load(self, state: dict[str, Any]) -> None:
        reader, planner = self._reader, _DataOnly(flatten_state_dict=False)
        with storage_errors(f"read {reader.path}"):
            try:
                planner.set_up_planner(state, reader.read_metadata(), is_coordinator=True)
                reader.set_up_storage_reader(reader.read_metadata(), True)
                plans = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
                for plan in reader.prepare_global_plan(plans):
                    reader.read_data(planner.finish_plan(plan), planner).wait()
            except _NOT_READABLE as error:
                reason = f"{type(error).__name__}: {error}"
                raise DamageError(f"torch cannot read {reader.path}", got=reason[:1000]) from error


def write_dcp(source: Source, folder: Path) -> None:
    """Write ``source`` into ``folder``, as a job of several ranks would: torch's writer keeps all of a rank's tensors.

    Nothing but the writer and the planner take part, in the order in which ``dcp.save`` calls them.
    """
    state: dict[str, Any] = {
        name: torch.empty(info.shape, dtype=dtype_of(info.dtype), device="meta")
        for name, info in source.tensors.items()
    }
    state |= {name: decode(value, name=name) for name, value in source.objects.items()}
    # Without copying ahead, torch's writer asks for one tensor after the other, in the order of the plan.
    writer, planner = FileSystemWriter(folder, per_thread_copy_ahead=0), _Streaming(source)
    with storage_errors(f"write {folder}"):
        writer.set_up_storage_writer(True)
        planner.set_up_planner(state, is_coordinator=True)
        (whole,), planned = planner.create_global_plan(
            [writer.prepare_local_plan(planner.create_local_plan())]
        )
        parts = writer.prepare_global_plan([replace(whole, items=items) for items in _parts(whole, source)])
        results = [writer.write_data(part, planner).wait() for part in parts]
        writer.finish(planned, results)


def _parts(plan: SavePlan, source: Source) -> list[list[WriteItem]]:
    """The items in their order, in parts of about PART_BYTES; objects go with the first."""
    parts: list[list[WriteItem]] = [[item for item in plan.items if item.tensor_data is None]]
    size = 0
    for item in plan.items:
        if item.tensor_data is not None:
            nbytes = source.tensors[item.index.fqn].nbytes
            if size and size + nbytes > PART_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(item)
            size += nbytes
    return parts


class _Streaming(DefaultSavePlanner):
    """Plans with tensors on the meta device, and hands over the real ones as they come."""

    def __init__(self, source: Source) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = source.read()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, planned = super().create_global_plan(all_plans)
        paths = {name: (name,) for name in planned.state_dict_metadata}  # where torch's tools put each name
        return plans, replace(planned, planner_data=paths)

    def lookup_object(self, index: MetadataIndex) -> Any:
        if not isinstance(self.state_dict[index.fqn], Tensor):
            return self.state_dict[index.fqn]
        name, tensor = next(self._tensors)
        if name != index.fqn:
            raise AssertionError(f"torch's writer asked for {index.fqn} when it was the turn of {name}")
        return tensor


class _DataOnly(DefaultLoadPlanner):
    """Loads values that are no tensors without running what a pickle says."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _Reader(FileSystemReader):
    """torch's reader, with metadata that was checked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        path = folder / METADATA
        with storage_errors(f"read {path}"), path.open("rb") as file:
            try:
                found = _MetadataUnpickler(file).load()
            except _NOT_READABLE as error:
                raise DamageError(
                    f"{path} cannot be read as the metadata of a checkpoint", got=str(error)
                ) from error
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise DamageError(f"{path} is not the metadata of a checkpoint", got=type(found).__name__)
        for info in found.storage_data.values():
            if (
                not isinstance(info, filesystem._StorageInfo)
                or Path(info.relative_path).name != info.relative_path
            ):
                raise DamageError(f"{path} names a file outside of its folder", got=str(info)[:200])
        self._checked = found

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checked


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that describe tensors and places in files."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        found = getattr(metadata, global_name, None)
        if module_name == metadata.__name__ == getattr(found, "__module__", None):
            return found
        if module_name == filesystem.__name__ and global_name in ("_StorageInfo", "_StoragePrefix"):
            return getattr(filesystem, global_name)
        if module_name == "torch" and global_name == "Size":
            return torch.Size
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        if (module_name, global_name) == ("torch.serialization", "_get_layout"):
            return _layout
        if module_name == "pathlib" and global_name in ("PosixPath", "PurePosixPath"):
            return PurePosixPath
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which no metadata needs")


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise ValueError(f"tensors of the layout {name}")
    return torch.strided
