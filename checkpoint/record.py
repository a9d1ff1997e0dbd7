"""What one writer says of its blob, kept beside it.

The record is the proof of being prepared: a writer writes it, durably, once all of its bytes are durable. It is the
attributes of the ``zarr.json`` that makes the blob a zarr array, so it costs no file of its own, stays with the blob
for good, and the manifest can be rebuilt from the records if it is lost.
"""

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from .layout import EXTENT_BYTES, STRIDE, WriterLayout
from .untrusted import Json, canonical, integer, matching, parse, refuse, table, text
from .untrusted import record as fields_of

VERSION = 1
"""of the format; readers refuse others"""
RECORD_LIMIT_BYTES = 1 << 28
MAX_WRITERS = 1 << 20
MAX_STEP = 10**15
CRC_BYTES = 4

ATTEMPT = re.compile(r"[a-z0-9]{1,32}").fullmatch
"""what tells apart several attempts at the same step"""
_DIGEST = re.compile(r"[0-9a-f]{32}").fullmatch

_CRC = {"name": "crc32c"}
_NO_CHUNK = 2**64 - 1


@dataclass(frozen=True)
class WriterRecord:
    """One writer's part of one checkpoint."""

    job: str
    step: int
    attempt: str
    writer: int
    world_size: int
    layout: WriterLayout
    crcs: tuple[int, ...]
    """of each extent, padding included"""
    objects: Mapping[str, Json]
    """state that is no tensor, by name (``safe_state``)"""

    @cached_property
    def digest(self) -> str:
        """Of everything in the record."""
        return hashlib.blake2b(self._spelt, digest_size=16).hexdigest()

    @cached_property
    def _spelt(self) -> bytes:
        return canonical(self._fields())

    def document(self) -> bytes:
        """JSON of what ``from_json`` reads, with the digest at its end."""
        return self._spelt[:-1] + b',"digest":"%s"}' % self.digest.encode()

    def _fields(self) -> dict[str, Json]:
        return {
            "version": VERSION,
            "job": self.job,
            "step": self.step,
            "attempt": self.attempt,
            "writer": self.writer,
            "world_size": self.world_size,
            "layout": self.layout.to_json(),
            "crcs": crcs_to_hex(self.crcs),
            "objects": dict(self.objects),
        }

    def to_json(self) -> Json:
        """What ``from_json`` reads."""
        return {**self._fields(), "digest": self.digest}

    @classmethod
    def from_json(cls, value: Json) -> "WriterRecord":
        """The record in a document that is not trusted.

        Raises:
            DamageError: it is not one, or its digest is not that of what it says.
        """
        check_version(value, "record")
        head = ("version", "job", "step", "attempt", "world_size")
        fields = fields_of(value, "record", *head, "writer", "layout", "crcs", "objects", "digest")
        layout = WriterLayout.from_json(fields["layout"])
        found = cls(
            **head_of(fields),
            writer=integer(fields["writer"], "record.writer", high=MAX_WRITERS),
            layout=layout,
            crcs=crcs_from_hex(fields["crcs"], "record.crcs", count=layout.num_extents),
            objects=table(fields["objects"], "record.objects"),
        )
        if not found.writer == layout.writer < found.world_size:
            refuse(
                "record.writer", f"{found.writer}, layout of {layout.writer}", f"less than {found.world_size}"
            )
        if fields["digest"] != found.digest:
            refuse("record.digest", fields["digest"], found.digest)
        return found


def head_of(fields: Mapping[str, Json]) -> dict[str, Json]:
    """What records and manifests say alike: job, step, attempt, world_size."""
    return {
        "job": text(fields["job"], "job"),
        "step": integer(fields["step"], "step", high=MAX_STEP),
        "attempt": matching(fields["attempt"], "attempt", ATTEMPT, "1 to 32 of a-z and 0-9"),
        "world_size": integer(fields["world_size"], "world_size", low=1, high=MAX_WRITERS),
    }


def check_version(value: Json, what: str) -> None:
    """Say so if a document is of a version that this program does not know, before anything else is looked at."""
    version = table(value, what).get("version")
    if version != VERSION or isinstance(version, bool):
        refuse(f"{what}: version of the format", version, str(VERSION))


def digest_of(value: Json, what: str) -> str:
    """A record's digest as the manifest has it."""
    return matching(value, what, _DIGEST, "32 hexadecimal digits")


def crcs_to_hex(crcs: tuple[int, ...]) -> str:
    """Eight digits a checksum."""
    return "".join(f"{crc:08x}" for crc in crcs)


def crcs_from_hex(value: Json, what: str, *, count: int) -> tuple[int, ...]:
    """``count`` checksums, or DamageError."""
    matching(value, what, re.compile(r"(?:[0-9a-f]{8})*").fullmatch, "8 hexadecimal digits for each extent")
    if len(value) != 8 * count:
        refuse(what, f"{len(value)} digits", f"{8 * count}")
    return struct.unpack(f">{count}I", bytes.fromhex(value))


def record_document(record: WriterRecord) -> bytes:
    """The ``zarr.json`` beside the blob: a uint8 array of the writer's bytes in one shard, extents its chunks."""
    shard = max(record.layout.num_extents, 1) * EXTENT_BYTES
    codecs = {
        "chunk_shape": [EXTENT_BYTES],
        "codecs": [{"name": "bytes"}, _CRC],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, _CRC],
        "index_location": "end",
    }
    array_of_bytes = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [record.layout.nbytes],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
        # The version 2 encoding names the only chunk "0": no folder just for it.
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": codecs}],
        "attributes": {"distrain": None},  # they come first
    }
    return canonical(array_of_bytes).replace(b"null", record.document(), 1)


def parse_record(data: bytes, what: str) -> WriterRecord:
    """The record in a ``zarr.json``, of which every byte must be as ``record_document`` writes it."""
    attributes = table(table(parse(data, what), what).get("attributes"), f"{what}: attributes")
    record = WriterRecord.from_json(attributes.get("distrain"))
    if record_document(record) != data:
        refuse(f"{what}: description of the array", "another one", "the one that belongs to the record")
    return record


def group_document(attributes: Mapping[str, Json]) -> bytes:
    """The ``zarr.json`` of a group."""
    return canonical({"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)})


def index_of(num_extents: int) -> bytes:
    """The shard index at the end of a blob, without its checksum: offset and size of each chunk."""
    entries = [(i * STRIDE, EXTENT_BYTES + CRC_BYTES) for i in range(num_extents)] or [(_NO_CHUNK, _NO_CHUNK)]
    return b"".join(struct.pack("<QQ", *entry) for entry in entries)
