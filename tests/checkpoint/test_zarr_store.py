"""The view for zarr: every tensor is an array of its name, shape and values, whatever boxes it is stored in."""

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from distrain.checkpoint import zarr_store as module
from distrain.checkpoint import zarr_view
from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.layout import DTYPES
from distrain.checkpoint.manifest import StoredBox, StoredTensor
from distrain.checkpoint.zarr_store import chunk_shape, node_name
from distrain.core.errors import DataError
from distrain.core.protocols import ShardBox
from helpers.checkpoints import Shard, whole, write_checkpoint

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def part(name: str, array: NDArray[Any], *region: slice) -> Shard:
    """A region of a tensor."""
    offset = tuple(s.indices(n)[0] for s, n in zip(region, array.shape, strict=True))
    box = ShardBox(
        fqn=name, dtype=array.dtype.name, global_shape=array.shape, offset=offset, shape=array[region].shape
    )
    return box, array[region]


def open_view(path: Path) -> Any:
    return zarr.open_group(zarr_view(path), mode="r")


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_type_comes_out_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    raw: NDArray[Any] = (
        np.random.default_rng(0).integers(0, 2, 6 * DTYPES[dtype], dtype=np.uint8).view(BITS[DTYPES[dtype]])
    )
    write_checkpoint(tmp_path, [[whole("w", dtype, raw.reshape(2, 3))]])
    array = open_view(tmp_path)["w"]
    assert array.shape == (2, 3)
    assert array.attrs["dtype"] == dtype
    assert array[:].tobytes() == raw.tobytes()


def test_boxes_on_a_grid_are_the_chunks(tmp_path: Path) -> None:
    array = np.arange(70, dtype=np.int32).reshape(10, 7)
    quarters = [
        part("w", array, y, x) for y in (slice(0, 6), slice(6, 10)) for x in (slice(0, 4), slice(4, 7))
    ]
    write_checkpoint(tmp_path, [quarters[:2], quarters[2:]])
    found = open_view(tmp_path)["w"]
    assert found.chunks == (6, 4)
    assert np.array_equal(found[:], array)
    assert np.array_equal(found[5:8, 2:5], array[5:8, 2:5])


def test_other_boxes_are_seen_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXTENT_BYTES", 100)
    array = np.arange(70, dtype=np.int32).reshape(10, 7)
    write_checkpoint(
        tmp_path,
        [[part("w", array, slice(0, 3), slice(0, 7))], [part("w", array, slice(3, 10), slice(0, 7))]],
    )
    found = open_view(tmp_path)["w"]
    assert found.chunks == (3, 7)
    assert np.array_equal(found[:], array)


@settings(max_examples=20)
@given(st.data())
def test_any_cuts_along_a_dim_give_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, shape[dim]), max_size=3))), shape[dim]]
    array = np.random.default_rng(0).standard_normal(shape)
    region = [slice(0, n) for n in shape]
    shards = [
        part("w", array, *region[:dim], slice(start, stop), *region[dim + 1 :])
        for start, stop in pairwise(edges)
    ]
    root = tmp_path_factory.mktemp("view")
    write_checkpoint(root, [shards])
    assert np.array_equal(open_view(root)["w"][...], array)


def test_scalars_and_tensors_without_elements(tmp_path: Path) -> None:
    state = [whole("n", "int64", np.array(7)), whole("none", "float32", np.empty((0, 3), np.float32))]
    write_checkpoint(tmp_path, [state])
    group = open_view(tmp_path)
    assert group["n"][()] == 7
    assert group["none"].shape == (0, 3) and group["none"][:].size == 0


NAMES = [
    "model.layers.0.weight",
    "a/b",
    "..",
    ".",
    "__hidden",
    "zarr.json",
    "c",
    "with space",
    "100%",
    "größe",
    "a.b/c",
]


def test_any_name_of_a_tensor_is_the_name_of_an_array(tmp_path: Path) -> None:
    state = [whole(name, "int32", np.full(3, i, np.int32)) for i, name in enumerate(NAMES)]
    write_checkpoint(tmp_path, [state])
    group = open_view(tmp_path)
    assert sorted(group.array_keys()) == sorted(map(node_name, NAMES))
    for i, name in enumerate(NAMES):
        array = group[node_name(name)]
        assert array.attrs["fqn"] == name
        assert np.array_equal(array[:], [i] * 3)


@given(st.lists(st.text(min_size=1, max_size=8), unique=True))
def test_different_tensors_have_different_names(names: list[str]) -> None:
    nodes = [node_name(name) for name in names]
    assert len(set(nodes)) == len(names)
    assert all("/" not in node and node.strip(".") and not node.startswith("__") for node in nodes)


def test_the_store_lists_what_it_has_and_takes_nothing(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int32).reshape(4, 3)
    write_checkpoint(
        tmp_path, [[part("w", array, slice(0, 2), slice(0, 3)), part("w", array, slice(2, 4), slice(0, 3))]]
    )
    store = zarr_view(tmp_path)
    assert store == zarr_view(tmp_path / "step-00000001") and store != zarr_view
    assert store.read_only and not store.supports_writes and not store.supports_deletes
    group = open_view(tmp_path)
    assert group.attrs["distrain"]["step"] == 1
    with pytest.raises(ValueError):
        group["w"][0] = 1
    with pytest.raises(ValueError):
        zarr.open_group(store, mode="a").create_array("new", shape=(2,), dtype="int8")
    assert "v" not in group


def test_keys_are_those_of_the_specification(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int32).reshape(4, 3)
    write_checkpoint(
        tmp_path, [[part("w", array, slice(0, 2), slice(0, 3)), part("w", array, slice(2, 4), slice(0, 3))]]
    )
    store = zarr_view(tmp_path)

    async def look() -> None:
        assert [key async for key in store.list()] == ["zarr.json", "w/zarr.json", "w/c/0/0", "w/c/1/0"]
        assert [key async for key in store.list_prefix("w/c/1")] == ["w/c/1/0"]
        assert sorted([name async for name in store.list_dir("")]) == ["w", "zarr.json"]
        assert sorted([name async for name in store.list_dir("w")]) == ["c", "zarr.json"]
        assert [
            await store.exists(key) for key in ("w/c/1/0", "w/c/2/0", "w/c/0", "w/c/0/x", "v/zarr.json")
        ] == [
            True,
            False,
            False,
            False,
            False,
        ]
        whole_chunk = await store.get("w/c/1/0")
        assert whole_chunk is not None and whole_chunk.to_bytes() == array[2:].tobytes()
        assert await store.get("w/c/9/9") is None
        requests: list[ByteRequest] = [RangeByteRequest(4, 8), OffsetByteRequest(20), SuffixByteRequest(4)]
        parts = await store.get_partial_values(default_buffer_prototype(), [("w/c/1/0", r) for r in requests])
        assert [p and p.to_bytes() for p in parts] == [
            array[2:].tobytes()[s] for s in (slice(4, 8), slice(20, None), slice(-4, None))
        ]
        metadata = await store.get("w/zarr.json")
        assert metadata is not None and json.loads(metadata.to_bytes())["shape"] == [4, 3]

    asyncio.run(look())


def test_damage_is_an_error_for_zarr_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [[whole("w", "uint8", np.arange(100, dtype=np.uint8))]])
    with (tmp_path / "step-00000001/data/0/0").open("r+b") as file:
        file.write(b"x")
    array = open_view(tmp_path)["w"]
    with pytest.raises(DamageError, match="extent 0"):
        array[:]


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        zarr_view(tmp_path)


def test_a_box_too_large_for_a_chunk_is_seen_in_rows() -> None:
    rows = 1 << 21
    box = StoredBox((0, 0), (rows, 1024), 0, 0, rows * 1024)
    assert chunk_shape(StoredTensor("uint8", (rows, 1024), (box,))) == (16384, 1024)
