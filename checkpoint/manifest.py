"""What a checkpoint holds, in one file whose presence makes it one.

The manifest lists every writer with the checksums of its extents, and every tensor with the boxes that tile it and
where their bytes lie. Whoever has it can find, verify and reshard any byte; nobody else's word is taken. It names no
paths: those follow from the numbers. Reading one checks all of it (types, ranges, that boxes tile their tensors, that
no bytes are claimed twice) before anything is used, because it may be damaged or forged.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from .blob import tail_of
from .crc import crc32c
from .errors import DamageError
from .layout import DTYPES, EXTENT_BYTES, checked_region, checked_tensor
from .record import (
    MAX_WRITERS,
    VERSION,
    WriterRecord,
    check_version,
    crcs_from_hex,
    crcs_to_hex,
    digest_of,
    head_of,
)
from .storage import Storage
from .stored import Manifest, StoredBox, StoredObject, StoredTensor, StoredWriter, check_manifest
from .untrusted import Json, array, canonical, integer, integers, number, parse, refuse, table, text
from .untrusted import record as fields_of

__all__ = [
    "MANIFEST",
    "Manifest",
    "StoredBox",
    "StoredObject",
    "StoredTensor",
    "StoredWriter",
    "manifest_document",
    "manifest_of",
    "parse_manifest",
    "read_manifest",
]

FORMAT = "distrain-checkpoint"
MANIFEST = "manifest.json"
MANIFEST_LIMIT_BYTES = 1 << 31
_TAIL = b',"crc":"%08x"}'


def manifest_of(records: Sequence[WriterRecord], *, created: float, mesh: Mapping[str, Json]) -> Manifest:
    """The manifest of the checkpoint that ``records`` describe.

    Raises:
        DamageError: a writer is missing or twice, they are not of one checkpoint, or do not make up whole tensors.
    """
    ordered = sorted(records, key=lambda record: record.writer)
    if not ordered or [record.writer for record in ordered] != list(range(ordered[0].world_size)):
        wanted = f"each of {ordered[0].world_size}" if ordered else "at least one"
        refuse("the set of writers", str([record.writer for record in ordered]), wanted)
    first = ordered[0]
    for record in ordered:
        if _head(record) != _head(first):
            refuse(f"the record of writer {record.writer}", str(_head(record)), str(_head(first)))
    manifest = Manifest(
        job=first.job,
        step=first.step,
        attempt=first.attempt,
        created=created,
        world_size=first.world_size,
        mesh=mesh,
        writers=tuple(_writer_of(record) for record in ordered),
        tensors=_tensors_of(ordered),
        objects=_objects_of(ordered),
    )
    check_manifest(manifest)
    return manifest


def _head(record: WriterRecord) -> tuple[str, int, str, int]:
    return record.job, record.step, record.attempt, record.world_size


def _writer_of(record: WriterRecord) -> StoredWriter:
    index_crc = int.from_bytes(tail_of(record.layout.num_extents)[-4:], "little")
    return StoredWriter(record.writer, record.layout.nbytes, record.crcs, index_crc, record.digest)


def _tensors_of(records: Sequence[WriterRecord]) -> dict[str, StoredTensor]:
    boxes: dict[str, list[StoredBox]] = defaultdict(list)
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for record in records:
        for piece in record.layout.pieces:
            box = piece.box
            kind = box.dtype, box.global_shape
            if kinds.setdefault(box.fqn, kind) != kind:
                refuse(f"{box.fqn} of writer {record.writer}", str(kind), str(kinds[box.fqn]))
            boxes[box.fqn].append(StoredBox(box.offset, box.shape, record.writer, piece.offset, piece.nbytes))
    return {
        fqn: StoredTensor(dtype, shape, tuple(sorted(boxes[fqn], key=lambda box: (box.offset, box.writer))))
        for fqn, (dtype, shape) in sorted(kinds.items())
    }


def _objects_of(records: Sequence[WriterRecord]) -> dict[str, tuple[StoredObject, ...]]:
    """Each value once, with the writers that have it: most are alike on all ranks."""
    found: dict[str, dict[bytes, StoredObject]] = defaultdict(dict)
    for record in records:
        for name, value in record.objects.items():
            same = found[name].setdefault(canonical(value), StoredObject((), value))
            found[name][canonical(value)] = StoredObject((*same.writers, record.writer), value)
    return {name: tuple(values.values()) for name, values in sorted(found.items())}


def manifest_document(manifest: Manifest) -> bytes:
    """The file: canonical JSON that ends with its own checksum."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "job": manifest.job,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "mesh": dict(manifest.mesh),
        "writers": [[w.nbytes, crcs_to_hex(w.crcs), w.index_crc, w.record_digest] for w in manifest.writers],
        "tensors": {fqn: _tensor_to_json(tensor) for fqn, tensor in manifest.tensors.items()},
        "objects": {
            name: [[list(o.writers), o.value] for o in stored] for name, stored in manifest.objects.items()
        },
    }
    document = canonical(body)
    return document[:-1] + _TAIL % crc32c(document)


def _tensor_to_json(tensor: StoredTensor) -> Json:
    boxes = [[list(b.offset), list(b.shape), b.writer, b.byte_offset] for b in tensor.boxes]
    return {"dtype": tensor.dtype, "global_shape": list(tensor.global_shape), "boxes": boxes}


def parse_manifest(data: bytes, what: str = "the manifest") -> Manifest:
    """The manifest in a document that is not trusted.

    Raises:
        DamageError: it is not one, or it contradicts itself.
    """
    tail = len(_TAIL % 0)
    body = data[:-tail] + b"}"
    if data[-tail:] != _TAIL % crc32c(body):
        raise DamageError(f"{what} is damaged or cut off: its checksum does not match")
    value = parse(body, what)
    if table(value, what).get("format") != FORMAT:
        refuse(f"{what}: format", value.get("format"), FORMAT)
    check_version(value, what)
    head = ("format", "version", "job", "step", "attempt", "created", "world_size", "mesh")
    fields = fields_of(value, what, *head, "writers", "tensors", "objects")
    rows = array(fields["writers"], "writers")
    manifest = Manifest(
        **head_of(fields),
        created=number(fields["created"], "created"),
        mesh=table(fields["mesh"], "mesh"),
        writers=tuple(_writer(writer, row) for writer, row in enumerate(rows)),
        tensors={fqn: _tensor(fqn, entry) for fqn, entry in table(fields["tensors"], "tensors").items()},
        objects={
            name: tuple(_objects(name, entry)) for name, entry in table(fields["objects"], "objects").items()
        },
    )
    check_manifest(manifest)
    return manifest


def _writer(writer: int, row: Json) -> StoredWriter:
    what = f"writer {writer}"
    nbytes, crcs, index_crc, digest = array(row, what, length=4)
    size = integer(nbytes, f"{what}: bytes")
    count = -(-size // EXTENT_BYTES)
    return StoredWriter(
        writer=writer,
        nbytes=size,
        crcs=crcs_from_hex(crcs, f"{what}: checksums", count=count),
        index_crc=integer(index_crc, f"{what}: checksum of the index", high=2**32 - 1),
        record_digest=digest_of(digest, f"{what}: digest of the record"),
    )


def _tensor(fqn: str, value: Json) -> StoredTensor:
    fields = fields_of(value, fqn, "dtype", "global_shape", "boxes")
    name, dtype, whole = checked_tensor(fqn, fields["dtype"], fields["global_shape"])
    boxes = []
    for row in array(fields["boxes"], f"{name}: boxes"):
        offset, shape, writer, byte_offset = array(row, f"{name}: a box", length=4)
        start, size = checked_region(name, whole, offset, shape)
        owner = integer(writer, f"{name}: writer", high=MAX_WRITERS)
        where = integer(byte_offset, f"{name}: byte offset")
        boxes.append(StoredBox(start, size, owner, where, prod(size) * DTYPES[dtype]))
    return StoredTensor(dtype, whole, tuple(boxes))


def _objects(name: str, value: Json) -> Iterator[StoredObject]:
    text(name, "an object's name")
    if not array(value, name):
        refuse(name, value, "at least one value")
    for row in value:
        writers, content = array(row, name, length=2)
        yield StoredObject(integers(writers, f"{name}: writers"), content)


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """The manifest of the checkpoint in ``folder``, checked.

    Raises:
        DamageError: there is none, or it cannot be trusted.
    """
    path = f"{folder}/{MANIFEST}"
    data = storage.read(path, limit_bytes=MANIFEST_LIMIT_BYTES)
    if data is None:
        raise DamageError(f"{path} is missing", hint=f"distrain ckpt repair {storage.name}/{folder}")
    return parse_manifest(data, path)
