"""Distrain's format and staging under torch.distributed.checkpoint, for loops that already call it.

Only the storage changes. What is saved gains checksums, an atomic commit and other readers (``distrain ckpt``, zarr,
``Checkpointer``), and loses pickle: torch's metadata is rebuilt from the manifest, and objects are kept as JSON::

    stager = DistrainStager()
    dcp.save(state, storage_writer=DistrainStorageWriter("run/step-100"))
    dcp.async_save(state, storage_writer=DistrainStorageWriter("run/step-200"), async_stager=stager)
    dcp.load(state, storage_reader=DistrainStorageReader("run"))            # the newest whole one
    dcp.load(state, storage_reader=DistrainStorageReader("run/step-100"))
    stager.close()

A path that ends in a number, alone or behind ``step-`` or ``step_``, is step N of the folder above it, and lies there
as ``step-0000000N``; any other is a folder of its own, with the checkpoint as its step 0. Saving the same step again
replaces the old one once the new one is whole. All ranks must see the same file system, as with torch's own writer.
"""

import io
import os
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from distrain.checkpoint.commit import begin, commit, discard, working_folder
from distrain.checkpoint.layout import pack
from distrain.checkpoint.locate import Located, locate
from distrain.checkpoint.manifest import Manifest, StoredTensor
from distrain.checkpoint.names import step_folder
from distrain.checkpoint.reshard import blobs, execute, plan
from distrain.checkpoint.safe_state import Json, decode, encode
from distrain.checkpoint.stream import BlobStream
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.checkpoint.torch_memory import array_of, bytes_of, dtype_name, dtype_of
from distrain.core.errors import ConfigError, DataError
from distrain.core.protocols import ShardBox

from .dcp_stager import DistrainStager

__all__ = ["DistrainStager", "DistrainStorageReader", "DistrainStorageWriter"]

PATHS = "torch.distributed.checkpoint.paths"
"""object that says where in the nested state dict each name belongs: what torch calls planner data"""

_ATTEMPT = "dcp"  # the same on all ranks without asking: cached plans carry nothing from one save to the next
_STEP = re.compile(r"(?:step[-_])?([0-9]{1,15})")


class DistrainStorageWriter(StorageWriter):
    """Writes a checkpoint of Distrain; each rank one blob."""

    def __init__(self, path: str | os.PathLike[str], *, job: str = "dcp") -> None:
        """``job`` is the name that the manifest gives to the run."""
        self._job = job
        self._rank = 0
        self.reset(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Go on with another checkpoint."""
        if checkpoint_id is not None:
            root, self._step = _root_and_step(checkpoint_id)
            self._storage = PosixStorage(root)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Learn this rank's number."""
        if not kwargs.get("use_collectives", True):
            raise ConfigError(
                "a checkpoint of Distrain is committed by all ranks together",
                got="use_collectives = False",
                allowed="use_collectives = True",
            )
        self._rank = kwargs.get("rank", 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make room, before anybody writes; tell everybody how many they are."""
        discard(self._storage, working_folder(self._storage, self._step, _ATTEMPT))
        begin(self._storage, self._step, _ATTEMPT)
        return [SavePlan(p.items, len(plans), p.planner_data, p.usable) for p in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's blob and record, durably."""
        tensors = [(item, _box_of(item)) for item in plan.items if item.tensor_data is not None]
        # An empty part of something is not worth a line; something that is empty as a whole is.
        tensors = [(item, box) for item, box in tensors if prod(box.shape) or not prod(box.global_shape)]
        layout = pack(self._rank, [box for _, box in tensors])
        objects = _objects_of(plan, planner)
        folder = working_folder(self._storage, self._step, _ATTEMPT)
        with BlobStream(self._storage, folder, layout) as blob:
            for piece, (item, _) in zip(layout.pieces, tensors, strict=True):
                blob.put(piece, bytes_of(cast(Tensor, planner.resolve_data(item))))
            blob.finish(
                job=self._job,
                step=self._step,
                attempt=_ATTEMPT,
                world_size=plan.storage_data,
                objects=objects,
            )
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [WriteResult(item.index, item.tensor_storage_size() or 0, None) for item in plan.items]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit what all ranks have written."""
        commit(self._storage, self._step, _ATTEMPT, mesh={})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this is a path of a local file system."""
        return "://" not in os.fspath(checkpoint_id)


class DistrainStorageReader(StorageReader):
    """Reads a checkpoint of Distrain, whoever wrote it; each rank reads each extent that it needs once."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.reset(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Go on with another checkpoint."""
        if checkpoint_id is not None:
            self._path = checkpoint_id

    def read_metadata(self) -> Metadata:
        """What the manifest says, in torch's words."""
        self._found = _locate(self._path)
        return metadata_of(self._found.manifest)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to learn."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read tensors into the planner's, and give it the objects."""
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                name = item.storage_index.fqn
                planner.load_bytes(
                    item, _as_torch_saves(decode(self._found.manifest.object(name), name=name))
                )
        self._read_tensors([item for item in plan.items if item.type is LoadItemType.TENSOR], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_tensors(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """Straight into the planner's tensors where these are on the CPU and of the stored dtype."""
        stored = self._found.manifest.tensors
        boxes = [_wanted(item, stored[item.storage_index.fqn]) for item in items]
        targets = [planner.resolve_tensor(item).detach() for item in items]
        places = [
            target
            if target.device.type == "cpu" and dtype_name(target.dtype) == box.dtype
            else torch.empty(box.shape, dtype=dtype_of(box.dtype))
            for target, box in zip(targets, boxes, strict=True)
        ]
        open_writer = blobs(self._found.storage, self._found.folder, self._found.manifest)
        execute(plan(boxes, stored), open_writer, [array_of(place) for place in places])
        for item, target, place in zip(items, targets, places, strict=True):
            if place is not target:
                target.copy_(place)
            planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether there is a checkpoint."""
        try:
            return bool(_locate(checkpoint_id))
        except DataError:
            return False


def metadata_of(manifest: Manifest) -> Metadata:
    """torch's metadata of the checkpoint that ``manifest`` describes."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=dtype_of(tensor.dtype)),
            torch.Size(tensor.global_shape),
            [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in tensor.boxes],
        )
        for name, tensor in manifest.tensors.items()
    }
    entries |= {name: BytesStorageMetadata() for name in manifest.objects if name != PATHS}
    paths: dict[str, tuple[str | int, ...]] = {name: (name,) for name in entries}
    for stored in manifest.objects.get(PATHS, ()):
        paths |= decode(stored.value, name=PATHS)
    return Metadata(entries, planner_data=paths)


def _root_and_step(path: str | os.PathLike[str]) -> tuple[Path, int]:
    full = Path(path).absolute()
    step = _STEP.fullmatch(full.name)
    return (full.parent, int(step[1])) if step else (full, 0)


def _locate(path: str | os.PathLike[str]) -> Located:
    root, step = _root_and_step(path)
    folder = root / step_folder(step)
    return locate(folder if folder.exists() and Path(path).absolute() != root else Path(path))


def _box_of(item: WriteItem) -> ShardBox:
    data = item.tensor_data
    assert data is not None
    size, whole = tuple(data.chunk.sizes), tuple(data.size)
    offset = tuple(map(min, data.chunk.offsets, whole))  # torch places empty shards beyond the end
    return ShardBox(
        fqn=item.index.fqn,
        dtype=dtype_name(data.properties.dtype),
        global_shape=whole,
        offset=offset,
        shape=size,
    )


def _objects_of(plan: SavePlan, planner: SavePlanner) -> dict[str, Json]:
    """What this rank saves that is no tensor, and the paths of all that it saves."""
    objects = {
        item.index.fqn: encode(_object_of(item, planner), name=item.index.fqn)
        for item in plan.items
        if item.tensor_data is None
    }
    mappings = plan.planner_data if isinstance(plan.planner_data, dict) else {}
    paths = {item.index.fqn: mappings[item.index.fqn] for item in plan.items if item.index.fqn in mappings}
    return objects | ({PATHS: encode(paths, name=PATHS)} if paths else {})


def _object_of(item: WriteItem, planner: SavePlanner) -> Any:
    if isinstance(planner, DefaultSavePlanner):
        return planner.lookup_object(item.index)
    # Other planners give torch.save's bytes; they were made in this process and never leave it.
    data = planner.resolve_data(item)
    assert isinstance(data, io.BytesIO)
    data.seek(0)
    return torch.load(data, weights_only=True)


def _as_torch_saves(value: Any) -> io.BytesIO:
    """The form in which planners of torch expect an object; made here, read here."""
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return data


def _wanted(item: ReadItem, tensor: StoredTensor) -> ShardBox:
    chunk = item.storage_index.offset or (0,) * len(tensor.global_shape)
    return ShardBox(
        fqn=item.storage_index.fqn,
        dtype=tensor.dtype,
        global_shape=tensor.global_shape,
        offset=tuple(a + b for a, b in zip(chunk, item.storage_offsets, strict=True)),
        shape=tuple(item.lengths),
    )
