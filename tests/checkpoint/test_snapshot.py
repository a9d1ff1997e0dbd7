"""Copies beside training: what is in them, what waits for them, and what makes them void."""

import threading
from collections.abc import Iterable

import pytest
import torch

from distrain.checkpoint.boxes import Item
from distrain.checkpoint.layout import EXTENT_BYTES, STRIDE, pack
from distrain.checkpoint.snapshot import Snapshot, buckets
from distrain.core.device import open_device
from distrain.core.protocols import ShardBox


def item(name: str, tensor: torch.Tensor) -> Item:
    shape = tuple(tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Item(
        ShardBox(fqn=name, dtype=dtype, global_shape=shape, offset=(0,) * len(shape), shape=shape), tensor
    )


class Taken:
    """A snapshot into plain memory, whose copying thread stops at ``gate`` before each extent."""

    def __init__(self, eager: list[Item], lazy: list[Item]) -> None:
        items = [*eager, *lazy]
        layout = pack(0, [each.box for each in items])
        self.memory = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
        self.layout = layout
        self.gate = threading.Event()
        self.complete: list[int] = []
        self.reasons: list[str] = []
        copies = [
            copy
            for index, (each, piece) in enumerate(zip(items, layout.pieces, strict=True))
            for copy in buckets(each, piece.offset, lazy=index >= len(eager))
        ]
        self.snapshot = Snapshot(
            copies,
            self.memory,
            layout,
            device=open_device("cpu"),
            place=self._place,
            report=self._report,
            done=self.reasons.append,
        )
        self.thread = threading.Thread(target=self.snapshot.run)

    def _place(self, extent: int) -> int:
        if threading.current_thread() is not threading.main_thread():
            self.gate.wait(10)
        return extent * STRIDE

    def _report(self, extents: Iterable[int]) -> None:
        self.complete += extents

    def read(self, index: int, like: torch.Tensor) -> torch.Tensor:
        piece = self.layout.pieces[index]
        data = torch.cat([each[:EXTENT_BYTES] for each in self.memory.split(STRIDE)])
        return data[piece.offset : piece.offset + piece.nbytes].view(like.dtype).view(like.shape)

    def finish(self) -> None:
        self.gate.set()
        self.thread.start() if not self.thread.ident else None
        self.thread.join(10)
        assert not self.thread.is_alive()


def test_every_extent_is_reported_once_and_holds_its_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3000, 2000, generator=generator), torch.arange(7), torch.randn(5, 5)[:, ::2]]
    tensors.append(torch.randn(2_000_000, generator=generator).bfloat16())
    taken = Taken([], [item(str(i), tensor) for i, tensor in enumerate(tensors)])
    taken.finish()
    assert taken.reasons == [""]
    assert sorted(taken.complete) == list(range(taken.layout.num_extents))
    for index, tensor in enumerate(tensors):
        assert torch.equal(taken.read(index, tensor), tensor)


def test_eager_items_are_copied_before_the_snapshot_exists_and_may_change_at_once() -> None:
    statistics, weight = torch.ones(10), torch.ones(1000)
    taken = Taken([item("statistics", statistics)], [item("weight", weight)])
    statistics.fill_(2)
    taken.finish()
    assert taken.reasons == [""]
    assert torch.equal(taken.read(0, statistics), torch.ones(10))


def test_a_tensor_that_changes_under_the_copy_makes_it_void() -> None:
    weight, other = torch.ones(1000), torch.ones(1000)
    taken = Taken([], [item("weight", weight), item("other", other)])
    taken.thread.start()
    weight.add_(1)
    taken.finish()
    assert taken.reasons == ["1 tensors changed while they were copied"]


def test_the_fence_opens_after_the_last_byte() -> None:
    taken = Taken([], [item("weight", torch.ones(1000))])
    taken.thread.start()
    assert not taken.snapshot.fence(timeout_s=0.05)
    taken.gate.set()
    assert taken.snapshot.fence(timeout_s=10)
    assert taken.complete == [0]
    taken.finish()


def test_a_copy_that_fails_says_why_and_opens_the_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Taken([], [item("weight", torch.ones(1000))])

    def refuse(extent: int) -> int:
        raise OSError("the stream is broken")

    monkeypatch.setattr(taken.snapshot, "_place", refuse)
    taken.finish()
    assert taken.reasons == ["OSError: the stream is broken"]
    assert taken.snapshot.fence(timeout_s=0)
