"""Checksums by which a keeper knows again what another one left in memory."""

import hashlib
import struct
from collections.abc import Mapping

from distrain.checkpoint.crc import crc32c
from distrain.checkpoint.flush import SlotMemory
from distrain.checkpoint.untrusted import Json, canonical


def objects_digest(objects: Mapping[str, Json]) -> str:
    """Equal for equal objects only."""
    return hashlib.blake2b(canonical(dict(objects)), digest_size=16).hexdigest()


def sums_of(memory: SlotMemory) -> int:
    """Checksum over the checksums of all extents, which must be known."""
    return crc32c(b"".join(struct.pack("<I", memory.crcs[i]) for i in range(memory.layout.num_extents)))
