"""crc32c: the standard's values, whichever engine computes it, on any memory, in any pieces."""

import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.checkpoint import crc
from distrain.checkpoint.crc import crc32c

ENGINES = dict(crc._engines())

# RFC 3720, appendix B.4
VECTORS = {
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(range(31, -1, -1)): 0x113FDB5C,
    b"123456789": 0xE3069283,
    b"": 0,
}


@pytest.mark.parametrize("data", VECTORS)
def test_the_standards_examples_come_out(data: bytes) -> None:
    assert crc32c(data) == VECTORS[data]


@pytest.mark.parametrize("name", ENGINES)
@given(data=st.binary(max_size=5000), first=st.integers(0, 5000))
def test_all_engines_agree_and_go_on_from_what_came_before(name: str, data: bytes, first: int) -> None:
    array = np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8)
    engine = ENGINES[name]
    whole = engine(array, 0)
    assert whole == crc32c(data)
    assert engine(array[first:], engine(array[:first], 0)) == whole


def test_long_data_is_taken_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crc, "_AT_ONCE", 1000)
    data = np.random.default_rng(0).integers(0, 256, (3 << 20) + 7, dtype=np.uint8)
    values = {engine(data, 5) for engine in ENGINES.values()}
    assert len(values) == 1


def test_memory_of_any_kind_is_read_where_it_lies() -> None:
    data = bytes(range(256)) * 40
    mapped = mmap.mmap(-1, len(data))
    mapped[:] = data
    kinds = (data, bytearray(data), memoryview(data), memoryview(mapped), np.frombuffer(data, np.uint8))
    assert {crc32c(kind) for kind in kinds} == {crc32c(data)}
    with pytest.raises(BufferError):
        crc32c(memoryview(data)[::2])


def test_without_any_library_the_python_face_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crc, "_symbol", lambda path, name: None)
    crc.engine.cache_clear()
    try:
        assert crc.engine()[0] == "google-crc32c, copying"
        assert crc32c(b"123456789") == 0xE3069283
    finally:
        crc.engine.cache_clear()


def test_an_engine_that_computes_something_else_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    real = dict(ENGINES)

    def engines() -> object:
        yield "wrong", lambda data, value: 1
        yield from real.items()

    monkeypatch.setattr(crc, "_engines", engines)
    crc.engine.cache_clear()
    try:
        assert crc.engine()[0] == next(iter(real))
    finally:
        crc.engine.cache_clear()
