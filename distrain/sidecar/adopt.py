"""Taking over memory that another keeper has filled, from the hands of a trainer that has outlived it.

A slot is taken over if its header is whole, says the same as the trainer does about job, step and layout, and, where
the other keeper had found all checksums, the bytes still have them. Everything else counts as free.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distrain.checkpoint.arena import Arena
from distrain.checkpoint.blob import sealed_crc
from distrain.checkpoint.crc import crc32c
from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.flush import SlotMemory
from distrain.checkpoint.layout import EXTENT_BYTES, WriterLayout
from distrain.checkpoint.record import MAX_STEP
from distrain.checkpoint.untrusted import Json, array, integer, parse, record, refuse, table

from .sums import objects_digest, sums_of


@dataclass(frozen=True, slots=True)
class Claim:
    """What a trainer says is in a slot."""

    step: int
    layout: WriterLayout
    objects: Mapping[str, Json]


def read_claims(payload: bytes) -> dict[int, Claim]:
    """Claims by slot, from a hello; raises DamageError."""
    whole = record(parse(payload, "the claims"), "the claims", "layouts", "slots")
    layouts = [WriterLayout.from_json(each) for each in array(whole["layouts"], "layouts")]
    by_digest = {layout.digest: layout for layout in layouts}
    claims = {}
    for index, row in table(whole["slots"], "slots").items():
        fields = record(row, "a claim", "step", "digest", "objects")
        if fields["digest"] not in by_digest or not index.isdecimal():
            refuse("a claim", f"slot {index}", "one with a layout")
        step = integer(fields["step"], "step", high=MAX_STEP)
        claims[int(index)] = Claim(step, by_digest[fields["digest"]], table(fields["objects"], "objects"))
    return claims


def adopt(arena: Arena, index: int, claim: Claim, *, job: str, writer: int, world_size: int) -> SlotMemory:
    """The memory of a slot that can be trusted; takes as long as reading it.

    Raises:
        DamageError: it cannot.
    """
    header = arena.header(index)
    if header is None:
        raise DamageError(f"slot {index} has no whole header, or was not sealed")
    said = (job, claim.step, writer, world_size, claim.layout.digest, objects_digest(claim.objects))
    found = (header.job, header.step, header.writer, header.world_size)
    if (*found, header.layout_digest, header.objects_digest) != said:
        raise DamageError(
            f"slot {index} holds something else than the trainer says", got=f"step {header.step}"
        )
    memory = SlotMemory(arena.slot(index), claim.layout)
    if memory.streams or claim.layout.writer != writer:
        raise DamageError(f"slot {index} does not fit its layout")
    if header.sums is not None:
        for extent in range(claim.layout.num_extents):
            data = memory.extent(extent)
            memory.crcs[extent] = crc32c(data[:EXTENT_BYTES])
            if memory.crcs[extent] != sealed_crc(data):
                raise DamageError(f"slot {index}: extent {extent} is damaged")
        if sums_of(memory) != header.sums:
            raise DamageError(f"slot {index}: checksums of another snapshot")
    return memory
