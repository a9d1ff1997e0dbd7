"""What is planned: buffers with known lifetimes and sizes, each to get one address for its whole life.

This is dynamic storage allocation with everything known ahead (MEMO, arXiv 2407.12117, section 4.2): draw time to the
right and addresses upwards, and every buffer is a rectangle that can only be moved up and down. Find offsets so that
no two rectangles meet and the highest top, the peak, is as low as possible::

    address
      |   +-----+
      |   |  c  +--+
      |  ++--+--+  |        a lives in [0, 6), b in [1, 3), c in [1, 4), d in [3, 5):
      |  | b |  d  |        half-open, so d may take over b's bytes
      | ++---+-----+-+
      | |      a     |
      +-+------------+----> time
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distrain.core.errors import Problem as Mistake
from distrain.core.errors import raise_if

LIMIT = 2**62
"""sums of sizes and all times stay below this, so that native code can count in 64 bits"""


@dataclass(frozen=True, slots=True)
class Buffer:
    """One request: ``size`` bytes from time ``lower`` to just before ``upper``."""

    id: str
    lower: int
    upper: int
    size: int

    def meets(self, other: "Buffer") -> bool:
        """Whether both live at some moment, and so must not share an address."""
        return self.lower < other.upper and other.lower < self.upper


def mistakes(buffers: Sequence[Buffer], where: Sequence[str] = ()) -> list[Mistake]:
    """All that keeps ``buffers`` from being a problem; ``where`` names each of them for the reader."""
    found, seen = [], dict[str, int]()
    for index, buffer in enumerate(buffers):
        place = where[index] if where else f"buffer {index}"
        if buffer.id in seen:
            first = where[seen[buffer.id]] if where else f"buffer {seen[buffer.id]}"
            found.append(
                Mistake(f"{place} repeats an id", got=f"{buffer.id}, as {first}", allowed="each once")
            )
        seen.setdefault(buffer.id, index)
        if buffer.size < 0:
            found.append(Mistake(f"{place} has a negative size", got=str(buffer.size), allowed="0 and up"))
        if buffer.upper <= buffer.lower:
            found.append(
                Mistake(
                    f"{place} never lives",
                    got=f"lower = {buffer.lower}, upper = {buffer.upper}",
                    allowed="lower < upper (upper itself is no longer alive)",
                )
            )
        if max(abs(buffer.lower), abs(buffer.upper)) >= LIMIT:
            found.append(Mistake(f"{place} lives at a time too far off", allowed=f"below {LIMIT}"))
    if sum(max(buffer.size, 0) for buffer in buffers) >= LIMIT:
        found.append(Mistake("the sizes sum to more than can be counted", allowed=f"below {LIMIT} in all"))
    return found


def check(buffers: Sequence[Buffer]) -> None:
    """Raise ConfigError that lists every mistake in ``buffers``, if there is any."""
    raise_if(mistakes(buffers))


def aligned(buffers: Sequence[Buffer], *, alignment: int) -> tuple[Buffer, ...]:
    """``buffers`` with sizes rounded up: if all sizes are multiples, so are the offsets that planners find."""
    return tuple(
        Buffer(each.id, each.lower, each.upper, -(-each.size // alignment) * alignment) for each in buffers
    )
