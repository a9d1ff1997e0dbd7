"""What this rank writes of its state: its share of what replicas hold in common, in the order in which it is copied.

Ranks talk only when their boxes have changed since the last time; in the steady state nothing is exchanged.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from distrain.core.protocols import ShardBox

from .boxes import Item, State, collect, fenced_storages, optimizers
from .divide import divide, owners
from .layout import EXTENT_BYTES, STRIDE, WriterLayout, pack
from .ranks import Ranks
from .snapshot import Copy, buckets


class Writing:
    """The division of the state among the ranks, kept for as long as the boxes stay the same."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._planned: tuple[list[ShardBox], WriterLayout, list[int]] | None = None
        """boxes of this rank, what it writes of them, and of which box each piece is"""

    def plan(
        self, state: State, tracked: Mapping[str, Any], *, lazy: bool
    ) -> tuple[WriterLayout, list[Copy]]:
        """The layout of this rank's blob and the copies that fill it, eager ones first.

        With ``lazy``, what an optimizer's step fences is copied beside the next step.
        """
        fenced = fenced_storages(tracked) if lazy else set()
        is_lazy = [item.tensor.untyped_storage().data_ptr() in fenced for item in state.items]
        items = [state.items[i] for i in sorted(range(len(is_lazy)), key=is_lazy.__getitem__)]
        layout, sources = self._divided([item.box for item in items])
        first_lazy = len(items) - sum(is_lazy)
        copies: list[Copy] = []
        for source, piece in zip(sources, layout.pieces, strict=True):
            part: Item = items[source].part(piece.box)
            copies += buckets(part, piece.offset, lazy=source >= first_lazy)
        return layout, copies

    def _divided(self, boxes: list[ShardBox]) -> tuple[WriterLayout, list[int]]:
        if self._planned is None or self._planned[0] != boxes:
            every = self._ranks.gather([asdict(box) for box in boxes])
            mine = divide([[_box(fields) for fields in each] for each in every])[self._ranks.rank]
            layout = pack(self._ranks.rank, mine)
            self._planned = boxes, layout, owners(boxes, [piece.box for piece in layout.pieces])
        return self._planned[1:]


def estimate_bytes(tracked: Mapping[str, Any]) -> int:
    """Memory of one snapshot: what is tracked now, and two moments for each optimizer that has none yet."""
    total = sum(item.tensor.nbytes + EXTENT_BYTES // 256 for item in collect(tracked).items)
    for optimizer in optimizers(tracked):
        if not optimizer.state:
            total += 2 * sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    return (total // EXTENT_BYTES + 2) * STRIDE


def _box(fields: dict[str, Any]) -> ShardBox:
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    return ShardBox(**values)
