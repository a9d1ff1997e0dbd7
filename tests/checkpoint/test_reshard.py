"""Loading into other shapes of shards: every byte arrives, every extent is read once, every misfit is named."""

import contextlib
import math
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.intersect import boxes, meeting
from distrain.checkpoint.layout import DTYPES, EXTENT_BYTES, STRIDE
from distrain.checkpoint.reshard import execute, plan
from distrain.core.errors import ConfigError
from distrain.core.protocols import ShardBox

Point = tuple[int, ...]
UNITS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "V16"}


@dataclass(frozen=True)
class Stored:
    offset: Point
    shape: Point
    writer: int
    byte_offset: int


@dataclass(frozen=True)
class Tensor:
    dtype: str
    global_shape: Point
    boxes: list[Stored]


@dataclass
class Memory:
    """Writers whose extents are numpy arrays, of which only touched pages cost anything; counts reads."""

    extents: dict[tuple[int, int], NDArray[np.uint8]] = field(default_factory=dict)
    reads: Counter[tuple[int, int]] = field(default_factory=Counter)
    open: Counter[int] = field(default_factory=Counter)
    opened: Counter[int] = field(default_factory=Counter)
    damaged: int = -1
    """the writer whose extents are"""

    def write(self, writer: int, byte_offset: int, data: bytes) -> None:
        for i in range(len(data)):
            extent, inside = divmod(byte_offset + i, EXTENT_BYTES)
            if (writer, extent) not in self.extents:
                self.extents[writer, extent] = np.zeros(EXTENT_BYTES, np.uint8)
            self.extents[writer, extent][inside] = data[i]

    @contextlib.contextmanager
    def opens(self, writer: int) -> Iterator["Writer"]:
        self.opened[writer] += 1
        self.open[writer] += 1
        try:
            yield Writer(self, writer)
        finally:
            self.open[writer] -= 1


@dataclass
class Writer:
    memory: Memory
    number: int

    def read(self, extent: int, buffer: memoryview) -> memoryview:
        assert self.memory.open[self.number] == 1
        assert buffer.nbytes == STRIDE and np.frombuffer(buffer, np.uint8).ctypes.data % 4096 == 0
        if self.number == self.memory.damaged:
            raise DamageError("crc")
        self.memory.reads[self.number, extent] += 1
        return self.memory.extents[self.number, extent].data


@st.composite
def partitions(draw: st.DrawFn, shape: Point, max_cuts: int = 6) -> list[tuple[Point, Point]]:
    """Boxes (offset, shape) that tile ``shape``: uneven, some of them empty, as cuts at random places give them."""
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, max_cuts)) if shape else 0):
        offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, size[dim]))
        for start, length in ((0, cut), (cut, size[dim] - cut)):
            boxes.append(
                (
                    (*offset[:dim], offset[dim] + start, *offset[dim + 1 :]),
                    (*size[:dim], length, *size[dim + 1 :]),
                )
            )
    return draw(st.permutations(boxes))


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, NDArray[Any]], dict[str, Tensor], Memory]:
    """Whole tensors, and the same cut into boxes that lie around the border of two extents of a few writers."""
    wholes, tensors, memory = {}, {}, Memory()
    ends: dict[int, int] = defaultdict(lambda: EXTENT_BYTES - 64 * draw(st.integers(0, 20)))
    for i in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
        dtype = draw(st.sampled_from(["float32", "bfloat16", "uint8", "float64", "complex128", "bool"]))
        unit = UNITS[DTYPES[dtype]]
        data = np.random.default_rng(i).integers(0, 256, math.prod(shape) * DTYPES[dtype], np.uint8)
        whole = data.view(unit).reshape(shape)
        held = []
        for offset, size in draw(partitions(shape)):
            writer = draw(st.integers(0, 2))
            part = whole[slices(offset, size)].tobytes()
            start = -(-ends[writer] // DTYPES[dtype]) * DTYPES[dtype]
            memory.write(writer, start, part)
            ends[writer] = start + len(part)
            held.append(Stored(offset, size, writer, start))
        wholes[f"t{i}"], tensors[f"t{i}"] = whole, Tensor(dtype, shape, held)
    return wholes, tensors, memory


def slices(offset: Point, shape: Point) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))


def box(name: str, tensor: Tensor, offset: Point, shape: Point) -> ShardBox:
    return ShardBox(
        fqn=name, dtype=tensor.dtype, global_shape=tensor.global_shape, offset=offset, shape=shape
    )


def strided(shape: Point, unit: str, order: Sequence[int]) -> NDArray[Any]:
    """Memory of ``shape`` that is part of something larger, with its dims in some order."""
    larger = np.zeros([shape[dim] * 2 + 1 for dim in order], unit)
    cut = larger[tuple(slice(1, None, 2) for _ in order)]
    return cut.transpose(np.argsort(order)) if shape else np.zeros((), unit)


@given(st.data())
def test_any_partition_loads_into_any_other_and_reads_each_extent_once(data: st.DataObject) -> None:
    wholes, tensors, memory = data.draw(checkpoints())
    targets, out = [], []
    for name, tensor in tensors.items():
        for offset, shape in data.draw(partitions(tensor.global_shape)):
            targets.append(box(name, tensor, offset, shape))
            order = data.draw(st.permutations(range(len(shape))))
            out.append(strided(shape, UNITS[DTYPES[tensor.dtype]], order))
    todo = plan(targets, tensors)
    execute(todo, memory.opens, out, num_threads=data.draw(st.integers(1, 3)))

    for target, got in zip(targets, out, strict=True):
        want = wholes[target.fqn][slices(target.offset, target.shape)]
        assert got.tobytes() == want.tobytes()
    assert set(memory.reads.values()) <= {1}
    assert [(read.writer, read.extent) for read in todo.reads] == sorted(memory.reads)
    assert set(memory.opened.values()) <= {1} and not any(memory.open.values())


@given(st.data())
def test_a_part_reads_only_the_extents_that_hold_some_of_it(data: st.DataObject) -> None:
    wholes, tensors, memory = data.draw(checkpoints())
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    offset, shape = data.draw(st.sampled_from(data.draw(partitions(tensor.global_shape))))
    out = np.zeros(shape, UNITS[DTYPES[tensor.dtype]])
    execute(plan([box(name, tensor, offset, shape)], tensors), memory.opens, [out])

    assert out.tobytes() == wholes[name][slices(offset, shape)].tobytes()
    assert set(memory.reads) == extents_with_elements(tensor, offset, shape)


def extents_with_elements(tensor: Tensor, offset: Point, shape: Point) -> set[tuple[int, int]]:
    """By looking at every element."""
    wanted = set(np.ndindex(*shape)) if shape else {()}
    wanted = {tuple(a + i for a, i in zip(offset, index, strict=True)) for index in wanted}
    found = set()
    for stored in tensor.boxes:
        for place, index in enumerate(np.ndindex(*stored.shape)):
            if tuple(a + i for a, i in zip(stored.offset, index, strict=True)) in wanted:
                found.add(
                    (stored.writer, (stored.byte_offset + place * DTYPES[tensor.dtype]) // EXTENT_BYTES)
                )
    return found


def simple(**tensors: tuple[str, Point]) -> tuple[dict[str, Tensor], Memory]:
    """Each tensor whole, one behind the other, in writer 0; the bytes count up."""
    made, memory, end = {}, Memory(), 0
    for name, (dtype, shape) in tensors.items():
        made[name] = Tensor(dtype, shape, [Stored((0,) * len(shape), shape, 0, end)])
        memory.write(0, end, bytes(i % 251 for i in range(math.prod(shape) * DTYPES[dtype])))
        end += -(-math.prod(shape) * DTYPES[dtype] // 64) * 64
    return made, memory


def whole(name: str, tensors: Mapping[str, Tensor]) -> ShardBox:
    shape = tensors[name].global_shape
    return box(name, tensors[name], (0,) * len(shape), shape)


def test_bytes_in_a_memoryview_and_overlapping_targets_are_filled_too() -> None:
    tensors, memory = simple(w=("float32", (4, 8)))
    target = whole("w", tensors)
    raw, array = bytearray(128), np.zeros((4, 8), np.float32)
    execute(plan([target, target], tensors), memory.opens, [memoryview(raw), array])
    assert bytes(raw) == array.tobytes() == bytes(range(128))
    assert memory.reads == {(0, 0): 1}


def test_every_misfit_is_listed_at_once() -> None:
    tensors, _ = simple(
        **{"layers.0.wq": ("float32", (4, 8)), "layers.0.wk": ("float32", (4, 8)), "norm": ("bfloat16", (8,))}
    )
    tensors["torn"] = Tensor("float32", (4, 8), [Stored((0, 0), (3, 8), 0, 0)])
    targets = [
        ShardBox(fqn="layers.0.wv", dtype="float32", global_shape=(4, 8), offset=(0, 0), shape=(4, 8)),
        ShardBox(fqn="layers.0.wk", dtype="float32", global_shape=(8, 8), offset=(0, 0), shape=(4, 8)),
        ShardBox(fqn="norm", dtype="float32", global_shape=(8,), offset=(0,), shape=(8,)),
        ShardBox(fqn="torn", dtype="float32", global_shape=(4, 8), offset=(2, 0), shape=(2, 4)),
    ]
    with pytest.raises(ConfigError) as caught:
        plan(targets, tensors, allow_extra=False)
    texts = [str(problem) for problem in caught.value.problems]
    assert len(texts) == 5
    assert "layers.0.wv is not in the checkpoint" in texts[0] and "layers.0.w" in texts[0].split("try:")[1]
    assert "layers.0.wq is in the checkpoint, and nothing asks for it" in texts[1]
    assert "layers.0.wk has another global shape" in texts[2] and "(8, 8) here, (4, 8) there" in texts[2]
    assert "norm has another dtype" in texts[3] and "float32 here, bfloat16 there" in texts[3]
    assert "torn is not stored whole" in texts[4] and "4 of the 8 elements" in texts[4]


def test_a_model_of_other_names_gives_a_list_that_can_be_read() -> None:
    tensors, _ = simple(**{f"a{i}": ("uint8", (1,)) for i in range(2000)})
    others, _ = simple(**{f"b{i}": ("uint8", (1,)) for i in range(2000)})
    with pytest.raises(ConfigError) as caught:
        plan([whole(name, others) for name in others], tensors)
    assert len(caught.value.problems) < 100 and "more" in caught.value.problems[-1].error


def test_a_partial_load_fills_what_is_there_and_says_what_is_not() -> None:
    tensors, memory = simple(a=("uint8", (4,)), b=("uint8", (4,)))
    others, _ = simple(b=("uint8", (4,)), c=("uint8", (4,)))
    targets = [whole("c", others), whole("b", tensors)]
    todo = plan(targets, tensors, allow_missing=True)
    assert (todo.missing, todo.extra) == (("c",), ("a",))
    untouched, filled = np.full(4, 9, np.uint8), np.zeros(4, np.uint8)
    execute(todo, memory.opens, [untouched, filled])
    assert untouched.tolist() == [9, 9, 9, 9] and filled.tolist() == [0, 1, 2, 3]


def test_boxes_stored_twice_are_refused_and_not_taken_for_coverage() -> None:
    twice = Tensor("uint8", (4,), [Stored((0,), (4,), 0, 0), Stored((0,), (4,), 1, 0)])
    with pytest.raises(ConfigError, match="8 of the 4 elements"):
        plan([whole("w", {"w": twice})], {"w": twice})


def test_empty_shards_and_empty_plans_read_nothing() -> None:
    tensors, memory = simple(a=("float32", (4, 8)))
    empty = box("a", tensors["a"], (4, 0), (0, 8))
    execute(plan([empty], tensors), memory.opens, [np.zeros((0, 8), np.float32)])
    execute(plan([], tensors), memory.opens, [])
    assert not memory.reads


def test_memory_that_does_not_fit_is_refused_before_anything_is_read() -> None:
    tensors, memory = simple(
        a=("float32", (4, 8)), b=("float32", (2,)), c=("float32", (2,)), d=("float32", ())
    )
    frozen = np.zeros(2, np.float32)
    frozen.flags.writeable = False
    out: Sequence[Any] = [
        np.zeros((8, 4), np.float32),
        np.zeros(2, np.float64),
        frozen,
        memoryview(bytearray(5)),
    ]
    with pytest.raises(ConfigError) as caught:
        execute(plan([whole(name, tensors) for name in tensors], tensors), memory.opens, out)
    assert [problem.error.split()[4] for problem in caught.value.problems] == ["a", "b", "c", "d"]
    assert not memory.reads


def test_damage_ends_the_load_with_its_error_and_leaves_nothing_open() -> None:
    tensors, memory = Tensor("uint8", (40,), [Stored((i,), (1,), i, 0) for i in range(40)]), Memory()
    for i in range(40):
        memory.write(i, 0, b"x")
    todo = plan([whole("w", {"w": tensors})], {"w": tensors})
    before = threading.active_count()
    memory.damaged = 20
    with pytest.raises(DamageError, match="crc"):
        execute(todo, memory.opens, [np.zeros(40, np.uint8)])
    assert not any(memory.open.values())
    assert len(memory.reads) < 40 and threading.active_count() == before


def test_a_plan_asks_for_contiguous_rows_of_a_large_box_as_few_blocks() -> None:
    shape = (4096, 4096)  # 64 MiB: four extents, and the box begins within the first
    tensors = {"w": Tensor("float32", shape, [Stored((0, 0), shape, 0, 4096 * 3)])}
    todo = plan([whole("w", tensors)], tensors)
    assert [len(read.blocks) for read in todo.reads] == [2, 3, 3, 3, 1]
    assert sum(math.prod(block.shape) for read in todo.reads for block in read.blocks) == math.prod(shape)


@pytest.mark.parametrize("columns", [False, True])
def test_thousands_of_boxes_meet_thousands_as_pair_by_pair_comparison_says(columns: bool) -> None:
    random = np.random.default_rng(0)
    shape = (3, 20_000) if columns else (20_000, 3)

    def some() -> list[tuple[int, Point, Point]]:
        starts, sizes = random.integers(0, shape, (1500, 2)), random.integers(0, 20, (1500, 2))
        groups = random.integers(0, 2, 1500)
        return [
            (int(g), tuple(a), tuple(n))
            for g, a, n in zip(groups, starts.tolist(), sizes.tolist(), strict=True)
        ]

    first, second = boxes(some(), 2), boxes(some(), 2)
    same = first.group[:, None] == second.group
    low = np.maximum(first.start[:, None], second.start)
    high = np.minimum(first.stop[:, None], second.stop)
    want = {(int(i), int(j)) for i, j in np.argwhere(same & (low < high).all(axis=2))}
    found = [(int(i), int(j)) for i, j in zip(*meeting(first, second), strict=True)]
    assert set(found) == want and len(found) == len(want) > 100
