"""The manifest: says what the records say, survives its file, and is refused if it is wrong anywhere."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.checkpoint.crc import crc32c
from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.layout import pack
from distrain.checkpoint.manifest import Manifest, manifest_document, manifest_of, parse_manifest
from distrain.checkpoint.record import WriterRecord, parse_record, record_document
from distrain.checkpoint.untrusted import canonical
from distrain.core.protocols import ShardBox

WORLD = 2


def half(name: str, writer: int) -> ShardBox:
    return ShardBox(fqn=name, dtype="bfloat16", global_shape=(8, 3), offset=(4 * writer, 0), shape=(4, 3))


def record(writer: int, **changes: Any) -> WriterRecord:
    boxes = [half("a", writer), half("b.c", writer)]
    if writer == 0:
        boxes.append(ShardBox(fqn="n", dtype="int64", global_shape=(), offset=(), shape=()))
    layout = pack(writer, boxes)
    fields: dict[str, Any] = {
        "job": "run",
        "step": 7,
        "attempt": "a0",
        "writer": writer,
        "world_size": WORLD,
        "layout": layout,
        "crcs": (writer,) * layout.num_extents,
        "objects": {"config": {"lr": 0.1}, "rng": writer},
    }
    return WriterRecord(**{**fields, **changes})


def good() -> Manifest:
    return manifest_of([record(1), record(0)], created=1.5, mesh={"tp": 2})


def signed(document: Any) -> bytes:
    """A manifest's file with a right checksum, whatever it says; text is taken as it is."""
    body = document.encode() if isinstance(document, str) else canonical(document)
    return body[:-1] + b',"crc":"%08x"}' % crc32c(body)


def content() -> Any:
    document = json.loads(manifest_document(good()))
    del document["crc"]
    return document


def test_a_manifest_survives_its_file() -> None:
    manifest = good()
    assert parse_manifest(manifest_document(manifest)) == manifest
    assert parse_manifest(signed(content())) == manifest


def test_boxes_tensors_and_bytes_are_those_of_the_records() -> None:
    manifest = good()
    assert list(manifest.tensors) == ["a", "b.c", "n"]
    assert manifest.nbytes == 2 * 8 * 3 * 2 + 8
    second = manifest.tensors["b.c"].boxes[1]
    assert (second.offset, second.shape, second.writer) == ((4, 0), (4, 3), 1)
    assert second.byte_offset == record(1).layout.pieces[1].offset
    assert [writer.crcs for writer in manifest.writers] == [(0,), (1,)]


def test_objects_are_kept_once_if_equal_and_by_writer_if_not() -> None:
    manifest = good()
    assert len(manifest.objects["config"]) == 1
    assert manifest.object("config", rank=1) == {"lr": 0.1}
    assert [manifest.object("rng", rank=rank) for rank in (0, 1, 5)] == [0, 1, 0]
    with pytest.raises(KeyError):
        manifest.object("nothing")


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(0)],
        [record(0), record(0)],
        [record(0), record(1), record(1)],
        [record(0), record(1, step=8)],
        [record(0), record(1, attempt="b")],
        [record(0), record(1, job="other")],
        [record(0), record(1, world_size=3)],
        [record(0), record(1, layout=pack(1, [half("a", 1)]))],
        [record(0), record(1, layout=pack(1, [half("a", 0), half("b.c", 1)]))],
    ],
    ids=["none", "missing", "twice", "too many", "step", "attempt", "job", "world size", "gap", "overlap"],
)
def test_records_that_do_not_make_one_checkpoint_are_refused(records: list[WriterRecord]) -> None:
    with pytest.raises(DamageError):
        manifest_of(records, created=0.0, mesh={})


def test_a_tensor_of_two_types_is_refused() -> None:
    other = ShardBox(fqn="a", dtype="float16", global_shape=(8, 3), offset=(4, 0), shape=(4, 3))
    with pytest.raises(DamageError, match="a of writer 1"):
        manifest_of([record(0), record(1, layout=pack(1, [other, half("b.c", 1)]))], created=0.0, mesh={})


@given(st.data())
def test_any_flipped_bit_or_cut_is_refused(data: st.DataObject) -> None:
    document = bytearray(manifest_document(good()))
    position = data.draw(st.integers(0, len(document) - 1))
    flipped = bytearray(document)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    for damaged in (flipped, document[:position], document + b" "):
        with pytest.raises(DamageError):
            parse_manifest(bytes(damaged))


def place(*path: str | int) -> Callable[[Any, Any], None]:
    """Sets the value at ``path``."""

    def put(document: Any, value: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return put


DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]

HOSTILE: list[tuple[tuple[str | int, ...], Any]] = [
    (("format",), "other"),
    (("version",), 2),
    (("version",), True),
    (("job",), 5),
    (("job",), ""),
    (("step",), -1),
    (("step",), "7"),
    (("step",), 10**18),
    (("attempt",), "../../etc"),
    (("attempt",), "A"),
    (("created",), "now"),
    (("world_size",), 0),
    (("world_size",), 3),
    (("world_size",), 2**40),
    (("mesh",), []),
    (("writers",), {}),
    (("writers",), []),
    (("writers", 0), [1, "", 0]),
    (("writers", 0, 0), 2**63),
    (("writers", 0, 0), 2**61),
    (("writers", 0, 0), 10),
    (("writers", 0, 0), 0.5),
    (("writers", 0, 1), "zz" * 4),
    (("writers", 0, 1), ""),
    (("writers", 0, 1), "0" * 16),
    (("writers", 0, 2), 2**32),
    (("writers", 0, 3), "../../../etc/passwd"),
    (("tensors",), []),
    (("tensors", ""), {"dtype": "float32", "global_shape": [0], "boxes": []}),
    (("tensors", "x"), {"dtype": "float32", "global_shape": [4], "boxes": []}),
    (("tensors", "a", "path"), "../../x"),
    (("tensors", "a", "dtype"), "object"),
    (("tensors", "a", "global_shape"), [8, 3, 1]),
    (("tensors", "a", "global_shape"), [2**40, 2**40]),
    (("tensors", "a", "global_shape"), [8, -3]),
    (("tensors", "a", "global_shape"), 24),
    (("tensors", "a", "global_shape"), [9, 3]),
    (("tensors", "a", "boxes", 0), [[0, 0], [4, 3], 0]),
    (("tensors", "a", "boxes", 0, 0), [1, 0]),
    (("tensors", "a", "boxes", 0, 0), [-1, 0]),
    (("tensors", "a", "boxes", 0, 1), [2**62, 3]),
    (("tensors", "a", "boxes", 0, 1), [8, 3]),
    (("tensors", "a", "boxes", 0, 2), 2),
    (("tensors", "a", "boxes", 0, 2), "../0"),
    (("tensors", "a", "boxes", 0, 3), 64),
    (("tensors", "a", "boxes", 0, 3), 1),
    (("tensors", "a", "boxes", 0, 3), -64),
    (("tensors", "a", "boxes", 0, 3), 2**60),
    (("objects",), []),
    (("objects", "x"), []),
    (("objects", "x"), [[[0], 1, 2]]),
    (("objects", "x"), [[["0"], 1]]),
    (("objects", "x"), [[[2], 1]]),
    (("surprise",), 1),
    (("tensors", "a", "boxes"), DEEP),
]


@pytest.mark.parametrize(
    ("path", "value"), HOSTILE, ids=[f"{'.'.join(map(str, p))}={v!r:.30}" for p, v in HOSTILE]
)
def test_a_forged_manifest_is_refused(path: tuple[str | int, ...], value: Any) -> None:
    document = content()
    place(*path)(document, value)
    with pytest.raises(DamageError) as caught:
        parse_manifest(signed(document))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"format":"distrain-checkpoint","format":"distrain-checkpoint"}',
        '{"created":NaN}',
        '{"created":-Infinity}',
        '{"created":1e999}',
        '{"step":' + "9" * 10_000 + "}",
        '"text"',
        "",
        "}",
    ],
    ids=[
        "lists",
        "objects",
        "duplicate",
        "nan",
        "infinity",
        "overflow",
        "digits",
        "string",
        "empty",
        "brace",
    ],
)
def test_json_that_is_not_plain_is_refused(text: str) -> None:
    with pytest.raises(DamageError):
        parse_manifest(signed(text))


def test_bytes_that_are_not_text_are_refused() -> None:
    body = b'{"job":"\xff"}'
    with pytest.raises(DamageError):
        parse_manifest(body[:-1] + b',"crc":"%08x"}' % crc32c(body))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_whatever_stands_anywhere_is_accepted_or_refused_and_nothing_else(data: st.DataObject) -> None:
    document = at = content()
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
            continue
        at[key] = data.draw(JSON)
        break
    try:
        manifest = parse_manifest(signed(document))
    except DamageError:
        return
    assert parse_manifest(manifest_document(manifest)) == manifest


@given(st.data())
def test_a_records_file_is_refused_whatever_byte_of_it_changes(data: st.DataObject) -> None:
    document = record_document(record(0))
    assert parse_record(document, "the record") == record(0)
    position = data.draw(st.integers(0, len(document) - 1))
    damaged = bytearray(document)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamageError):
        parse_record(bytes(damaged), "the record")


def test_a_record_is_of_the_writer_that_its_layout_is_of() -> None:
    document = copy.deepcopy(record(0).to_json())
    wrong = record(1, layout=pack(0, [half("a", 0)]), crcs=(0,))
    with pytest.raises(DamageError, match="writer"):
        WriterRecord.from_json(wrong.to_json())
    assert WriterRecord.from_json(document) == record(0)
