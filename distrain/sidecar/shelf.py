"""All memory of a node's ranks, those of earlier world sizes included, and what can be read from it."""

from collections.abc import Iterator, Sequence

from distrain.checkpoint.untrusted import canonical
from distrain.core.wire import Frame, Header

from .slots import RankSlots, Snapshot, State


class Shelf:
    """The ranks' slots."""

    def __init__(self) -> None:
        self.ranks: list[RankSlots] = []

    def current(self, world: int, rank: int) -> RankSlots | None:
        """What a rank fills."""
        found = (each for each in self.ranks if (each.world_size, each.rank) == (world, rank))
        return next((each for each in found if not each.retired), None)

    def named(self, name: str) -> RankSlots | None:
        """The slots of that name."""
        return next((each for each in self.ranks if each.name == name), None)

    def writers(self, world: int) -> list[int]:
        """Ranks of a world size."""
        return sorted({each.rank for each in self.ranks if each.world_size == world})

    def snapshots(self, world: int, step: int) -> Iterator[tuple[RankSlots, Snapshot]]:
        """What is there of a step and any good."""
        for slots in self.ranks:
            if slots.world_size == world:
                for snapshot in list(slots.snapshots):
                    if snapshot and snapshot.step == step and not snapshot.discarded:
                        yield slots, snapshot

    def outdated(self, world: int) -> Iterator[tuple[RankSlots, Snapshot]]:
        """What nobody will miss now that every rank of ``world`` has a snapshot; ranks of other worlds retire."""
        for slots in self.ranks:
            slots.retired = slots.retired or slots.world_size != world
            for snapshot in list(slots.snapshots):
                if slots.retired and snapshot and not snapshot.is_needed:
                    yield slots, snapshot

    def sweep(self) -> None:
        """Free what is not needed any more."""
        for slots in list(self.ranks):
            slots.sweep()
            if slots.retired and not any(slots.snapshots):
                self.ranks.remove(slots)
                slots.arena.close()

    def complete(self, step: int) -> list[tuple[RankSlots, Snapshot]]:
        """What can be read of ``step``, of the world size that came last."""
        found = [
            (slots, each)
            for slots in self.ranks
            for each in filter(None, slots.snapshots)
            if each.step == step and each.is_complete and not each.discarded
        ]
        newest = max((each.order for _, each in found), default=0)
        world = next((slots.world_size for slots, each in found if each.order == newest), 0)
        return [(slots, each) for slots, each in found if slots.world_size == world]

    def complete_steps(self) -> list[Header]:
        """What can be read, newest first."""
        steps: dict[int, int] = {}
        for slots in self.ranks:
            for each in filter(None, slots.snapshots):
                steps[each.step] = max(each.order, steps.get(each.step, 0))
        rows = []
        for step in sorted(steps, key=lambda step: -steps[step]):
            if found := self.complete(step):
                rows.append(
                    {
                        "step": step,
                        "protected": all(each.state is State.PROTECTED for _, each in found),
                        "world_size": found[0][0].world_size,
                        "writers": sorted(slots.rank for slots, _ in found),
                    }
                )
        return rows


def describe(found: Sequence[tuple[RankSlots, Snapshot]]) -> Frame:
    """Where snapshots lie, for whoever reads them; their checksums must be known."""
    rows = [
        {
            "arena": slots.name,
            "writer": slots.rank,
            "layout": each.memory.layout.to_json(),
            "objects": dict(each.objects),
            "crcs": [each.memory.crcs[i] for i in range(each.memory.layout.num_extents)],
            "start": slots.arena.start(slots.snapshots.index(each)),
            "nbytes": each.memory.layout.slot_bytes,
        }
        for slots, each in found
    ]
    return Frame({}, canonical(rows))
