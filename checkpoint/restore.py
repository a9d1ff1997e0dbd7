"""Which state a job goes on from, and how each rank gets its part: the ladder from memory to disk.

Candidates are tried from the newest on. A step that is still whole in the keepers' memory needs no disk; otherwise the
newest good checkpoint of the fastest tier serves. All ranks agree on a candidate before and after they read it: if one
of them meets damage, all go on to the next, and say why. What a rank needs may have been written by ranks of any other
layout.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch

from distrain.core.errors import DataError, Problem, raise_if
from distrain.core.sidecar_client import KeeperClient, KeeperLost, KeeperRefused, PinnedWriter

from .boxes import Item
from .candidates import check_folder, folders
from .crc import crc32c
from .errors import DamageError
from .layout import EXTENT_BYTES, STRIDE, WriterLayout
from .load_plan import plan
from .ranks import Ranks
from .reshard import Extents, blobs, execute
from .share import execute_together
from .storage import Storage
from .stored import StoredBox, StoredTensor
from .torch_memory import array_of

log = logging.getLogger(__name__)

MEMORY = "memory"
Objects = Mapping[str, Mapping[int, Any]]
"""encoded state that is no tensor, by its name and by writer"""


@dataclass(frozen=True, slots=True)
class Source:
    """A whole step somewhere: what it holds, and how to read it."""

    step: int
    where: str
    tensors: Mapping[str, StoredTensor]
    objects: Objects
    open_writer: Callable[[int], AbstractContextManager[Extents]]


def memory_source(step: int, writers: Sequence[PinnedWriter]) -> Source:
    """What the pinned writers of a step hold together; it is whole if they are all writers of the job."""
    tensors: dict[str, list[tuple[Any, StoredBox]]] = defaultdict(list)
    objects: dict[str, dict[int, Any]] = defaultdict(dict)
    for writer in writers:
        for piece in WriterLayout.from_json(writer.layout).pieces:
            stored = StoredBox(piece.box.offset, piece.box.shape, writer.writer, piece.offset, piece.nbytes)
            tensors[piece.box.fqn].append((piece.box, stored))
        for name, value in writer.objects.items():
            objects[name][writer.writer] = value
    slots = {writer.writer: _Slot(writer) for writer in writers}
    whole = {
        name: StoredTensor(parts[0][0].dtype, parts[0][0].global_shape, tuple(stored for _, stored in parts))
        for name, parts in tensors.items()
    }
    return Source(step, MEMORY, whole, objects, lambda writer: nullcontext(slots[writer]))


def disk_sources(storage: Storage) -> Iterator[Source]:
    """The good checkpoints of a tier, newest first; what is refused is logged with the reason."""
    for folder, step in folders(storage):
        if source := disk_source(storage, folder, step=step):
            yield source


def disk_source(storage: Storage, folder: str, *, step: int) -> Source | None:
    """The checkpoint of ``step`` in ``folder``; None if it is refused, which is logged with the reason."""
    try:
        manifest = check_folder(storage, folder, step=step)
    except DataError as error:
        log.warning("%s is passed over: %s", folder, error)
        return None
    objects = {
        name: {writer: entry.value for entry in entries for writer in entry.writers}
        for name, entries in manifest.objects.items()
    }
    return Source(step, folder, manifest.tensors, objects, blobs(storage, folder, manifest))


def fill(source: Source, targets: Sequence[Item], *, strict: bool, node: Ranks | None = None) -> None:
    """Write the state of ``source`` into the tensors of ``targets``; the ranks of ``node`` do so together.

    Raises:
        ConfigError: it does not fit; with ``strict`` also if a target is not in it.
        DataError: bytes are damaged.
    """
    boxes = [item.box for item in targets]
    load_plan = plan(boxes, source.tensors, allow_missing=not strict)
    # Reading goes to the memory of the host; what lives elsewhere, or is a view that numpy cannot write, is copied.
    staged = [item.tensor if item.tensor.device.type == "cpu" else item.tensor.cpu() for item in targets]
    arrays = [array_of(tensor) for tensor in staged]
    if node is None:
        execute(load_plan, source.open_writer, arrays)
    else:
        execute_together(load_plan, source.open_writer, arrays, node=node)
    with torch.no_grad():
        for item, tensor in zip(targets, staged, strict=True):
            if tensor is not item.tensor:
                item.tensor.copy_(tensor)


def restore(
    targets: Callable[[Source], Sequence[Item]],
    *,
    client: KeeperClient | None,
    tiers: Sequence[Storage],
    ranks: Ranks,
    strict: bool,
    only: int | None = None,
) -> Source | None:
    """Fill what ``targets`` makes room for from the newest step that all ranks can read; None if there is none.

    With ``only``, no other step will do.
    """
    with closing(ranks.of_node()) as node:
        for source in _ladder(client, tiers, ranks, only):
            error = ""
            items = targets(source)
            if strict:
                _refuse_extra(source, items, ranks)
            try:
                fill(source, items, strict=strict, node=None if source.where == MEMORY else node)
            except (DataError, KeeperLost, KeeperRefused) as damage:
                error = str(damage)
            errors = [each for each in ranks.gather(error) if each]
            if not errors:
                return source
            log.warning("step %d in %s cannot be restored: %s", source.step, source.where, errors[0])
    return None


def _refuse_extra(source: Source, items: Sequence[Item], ranks: Ranks) -> None:
    """ConfigError if the source holds tensors for which no rank asks: each rank asks for its own stage's only."""
    asked = {name for names in ranks.gather(sorted({item.box.fqn for item in items})) for name in names}
    raise_if(
        [
            Problem(
                f"{name} is in the checkpoint, and nothing asks for it",
                hint="restore(strict=False) passes it over",
            )
            for name in source.tensors
            if name not in asked
        ]
    )


def _ladder(
    client: KeeperClient | None, tiers: Sequence[Storage], ranks: Ranks, only: int | None
) -> Iterator[Source]:
    """Sources that all ranks have, newest first; of one step, memory comes first."""
    in_memory = _steps_in_memory(client)
    memory_steps = ranks.common(list(in_memory))
    disks = []
    for tier in tiers:
        found = dict(folders(tier))
        disks.append((tier, {folder: found[folder] for folder in ranks.common(list(found))}))
    steps = {*memory_steps, *(step for _, found in disks for step in found.values())}
    for step in sorted(steps, reverse=True):
        if only is not None and step != only:
            continue
        if step in memory_steps:
            assert client is not None
            with suppress(KeeperLost):
                pinned: Sequence[PinnedWriter] = ()
                with suppress(KeeperRefused):
                    pinned = client.pin(step)
                try:
                    if ranks.all_true(len(pinned) == in_memory[step]):
                        yield memory_source(step, pinned)
                finally:
                    if pinned:
                        client.unpin(step)
        for tier, found in disks:
            for folder in (name for name, at in found.items() if at == step):
                source = disk_source(tier, folder, step=step)
                if ranks.all_true(source is not None) and source:
                    yield source


def _steps_in_memory(client: KeeperClient | None) -> dict[int, int]:
    """Steps of which this node has every writer, with their number."""
    if client is None:
        return {}
    with suppress(KeeperLost, KeeperRefused):
        return {
            each.step: each.world_size
            for each in client.sealed_steps()
            if each.protected and len(each.writers) == each.world_size
        }
    return {}


class _Slot:
    """The extents of one writer where they lie in the arena."""

    def __init__(self, pinned: PinnedWriter) -> None:
        self._pinned = pinned

    def read(self, extent: int, buffer: memoryview) -> memoryview:
        """The extent's bytes, checked against the crc that was taken when they were sealed."""
        data = self._pinned.memory[extent * STRIDE : extent * STRIDE + EXTENT_BYTES]
        if extent < len(self._pinned.crcs) and crc32c(data) != self._pinned.crcs[extent]:
            raise DamageError(f"extent {extent} of writer {self._pinned.writer} in memory is damaged")
        return data


def choose_objects(objects: Objects, name: str, *, rank: int) -> Any:
    """What ``rank`` saved under ``name``, or the first writer where it saved nothing; KeyError if nobody did."""
    by_writer = objects[name]
    return by_writer[rank] if rank in by_writer else by_writer[min(by_writer)]
