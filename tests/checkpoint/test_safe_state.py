"""State without tensors: what goes into JSON comes back with the same bits and types, and nothing else goes in."""

import json
import math
import os
import random
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.safe_state import MAX_BYTES, MAX_DEPTH, MAX_VALUES, decode, encode
from distrain.core.errors import ConfigError


def through_json(value: object) -> Any:
    """As a manifest carries it: strict JSON text, UTF-8, keys sorted."""
    return decode(json.loads(json.dumps(encode(value), allow_nan=False, sort_keys=True).encode()))


def assert_same(got: Any, want: Any) -> None:
    """Equal in value, type, order and bits."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert len(got) == len(want)
        for (got_key, got_item), (key, item) in zip(got.items(), want.items(), strict=True):
            assert_same(got_key, key)
            assert_same(got_item, item)
    elif isinstance(want, list | tuple):
        assert len(got) == len(want)
        for got_item, item in zip(got, want, strict=True):
            assert_same(got_item, item)
    elif isinstance(want, np.ndarray | np.generic):
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())
    elif isinstance(want, float):
        assert math.isnan(got) if math.isnan(want) else struct.pack("<d", got) == struct.pack("<d", want)
    else:
        assert got == want


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**5000), max_value=2**5000),
    st.floats(),
    st.text(st.characters()),
    st.text("$adt"),
    st.binary(),
    st.sampled_from([np.float32(0.1), np.float64("-inf"), np.int8(-3), np.bool_(True), np.complex64(1 - 2j)]),
)
keys = st.one_of(scalars, st.tuples(st.integers(), st.text()))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(st.text("ab$"), inner),
        st.dictionaries(keys, inner),
        st.dictionaries(keys, inner).map(OrderedDict),
    ),
    max_leaves=20,
)


@given(values)
def test_whatever_is_made_of_plain_types_comes_back_with_its_bits_types_and_order(value: object) -> None:
    assert_same(through_json(value), value)


@pytest.mark.parametrize(
    "value",
    [-0.0, 5e-324, 1e308, math.inf, -math.inf, math.nan, 2**53, -(2**53), 2**64, 1.0, 10**15],
)
def test_numbers_at_the_edges_keep_every_bit(value: float) -> None:
    assert_same(through_json(value), value)
    assert_same(through_json({-(2**20_000): value}), {-(2**20_000): value})


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "<i1", "<u2", ">i8", "|b1", "<c16"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 4), (2, 3)])
def test_arrays_keep_their_dtype_shape_and_bytes_and_can_be_written(
    dtype: str, shape: tuple[int, ...]
) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    array = np.asarray(array)
    got = through_json([array, array.T])
    assert_same(got, [array, np.ascontiguousarray(array.T).reshape(array.T.shape)])
    got[0][...] = 1


def test_random_generators_go_on_where_they_stopped() -> None:
    python, legacy = random.Random(3), np.random.RandomState(4)
    python.gauss(0, 1)
    legacy.normal()
    generators = [
        np.random.Generator(kind(5)) for kind in (np.random.PCG64, np.random.Philox, np.random.MT19937)
    ]
    state = {
        "python": python.getstate(),
        "legacy": legacy.get_state(),
        "numpy": [generator.bit_generator.state for generator in generators],
        "torch": torch.get_rng_state().numpy(),
    }
    back = through_json(state)

    again = random.Random()
    again.setstate(back["python"])
    assert [again.gauss(0, 1) for _ in range(5)] == [python.gauss(0, 1) for _ in range(5)]
    legacy_again = np.random.RandomState()
    legacy_again.set_state(back["legacy"])
    assert legacy_again.normal(size=5).tolist() == legacy.normal(size=5).tolist()
    for generator, saved in zip(generators, back["numpy"], strict=True):
        other = np.random.Generator(type(generator.bit_generator)())
        other.bit_generator.state = saved
        assert other.normal(size=5).tolist() == generator.normal(size=5).tolist()
    torch_again = torch.Generator()
    torch_again.set_state(torch.from_numpy(back["torch"]))
    assert torch.equal(torch_again.get_state(), torch.get_rng_state())


def test_states_of_optimizers_schedulers_and_scalers_fit_without_their_tensors() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    for scheduler in (
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5]),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
    ):
        assert_same(through_json(scheduler.state_dict()), scheduler.state_dict())
    groups = optimizer.state_dict()["param_groups"]
    assert_same(through_json(groups), groups)
    assert_same(through_json(Counter([2, 2, 5])), Counter([2, 2, 5]))


@pytest.mark.parametrize(
    "value",
    [torch.bfloat16, torch.float8_e4m3fn, torch.device("cuda:1"), torch.device("cpu"), torch.Size([2, 0])],
)
def test_types_of_torch_travel_by_name(value: object) -> None:
    assert_same(through_json({"value": value, "also": [value]}), {"value": value, "also": [value]})


class Colour(IntEnum):
    RED = 1


Pair = namedtuple("Pair", "a b")


class Text(str):
    pass


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Pair(1, 2),
        Text("x"),
        lambda: 0,
        object(),
        {1, 2},
        1j,
        defaultdict(list),
        np.array(["a"], dtype=object),
        np.array(["a"]),
        np.str_("a"),
        torch.zeros(2),
        torch.nn.Parameter(torch.zeros(2)),
        torch.Generator(),
        os.environ,
        range(3),
        np.ma.array([1]),
    ],
)
def test_what_has_no_safe_form_is_refused_and_named(value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        encode({"param_groups": [{"hook": value}]}, name="optimizer")
    (problem,) = caught.value.problems
    assert problem.error.startswith("optimizer['param_groups'][0]['hook'] ")
    assert type(value).__qualname__ in problem.got and problem.allowed and problem.hint


def test_all_values_that_are_refused_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        encode({"a": object(), "b": [1, (2, {3: Colour.RED})], object(): 1})
    paths = [problem.error.split(" cannot")[0] for problem in caught.value.problems]
    assert paths[:2] == ["state['a']", "state['b'][1][1][3]"] and paths[2].startswith("key <object")


def test_state_that_contains_itself_or_is_too_deep_ends_in_an_error() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ConfigError, match="too many levels"):
        encode(circle)
    deepest = encode(nested(MAX_DEPTH))
    assert decode(deepest) == nested(MAX_DEPTH)
    with pytest.raises(DamageError, match="too many levels"):
        decode([deepest])


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return [value]


def test_state_that_is_too_large_is_refused_on_both_ways() -> None:
    with pytest.raises(ConfigError, match=r"state\['b'\] cannot be kept .* too many bytes"):
        encode({"a": bytes(MAX_BYTES - 10), "b": np.zeros(3)})
    with pytest.raises(ConfigError, match="too many values"):
        encode([None] * MAX_VALUES)
    with pytest.raises(DamageError, match="too many values"):
        decode([None] * MAX_VALUES)
    with pytest.raises(DamageError, match="too many bytes"):
        decode(["a" * (MAX_BYTES // 2), "b" * (MAX_BYTES // 2), "c"])


@pytest.mark.parametrize(
    "encoded",
    [
        {"$pickle": "gASVCw=="},
        {"$tuple": {"0": 1}},
        {"$tuple": [], "$list": []},
        {"$tuple": [], "a": 1},
        {"$dict": [[1, 2, 3]]},
        {"$dict": [["a", 1], ["a", 2]]},
        {"$dict": [[[], 1]]},
        {"$counter": {"a": 1}},
        {"$float": "1e5"},
        {"$float": 1.0},
        {"$int": "ten"},
        {"$int": 10},
        {"$bytes": "!!"},
        {"$bytes": 5},
        {"$str": "/w=="},
        {"$array": ["<f4", [2], "AAAA"]},
        {"$array": ["<f4", [-1], "AAAAAA=="]},
        {"$array": ["<f4", [2**62, 2**62], ""]},
        {"$array": ["<f4", [True], "AAAAAA=="]},
        {"$array": ["|O8", [1], "AAAAAAAAAAA="]},
        {"$array": ["<f3", [1], "AAAA"]},
        {"$array": ["<U1", [1], "AAAAAA=="]},
        {"$array": ["f4,f4", [1], "AAAAAAAAAAA="]},
        {"$scalar": ["<f4", ""]},
        {"$scalar": ["<f4", "AAAAAAAAAAA="]},
        {"$dtype": "load"},
        {"$dtype": "__class__"},
        {"$dtype": 3},
        {"$device": "nowhere"},
        {"$size": [1.5]},
        {"$size": "12"},
        {1: 2},
        {"$tuple": [set()]},
        b"bytes",
    ],
)
def test_damaged_or_foreign_state_is_refused_and_its_place_named(encoded: object) -> None:
    with pytest.raises(DamageError, match=r"damaged at loader\['x'\]\[1\]"):
        decode({"x": [0, encoded]}, name="loader")


def test_plain_state_needs_no_torch() -> None:
    script = (
        "import sys, numpy; from distrain.checkpoint.safe_state import encode, decode;"
        "decode(encode([numpy.zeros(3), (1, {2: b'3'})])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=150)
