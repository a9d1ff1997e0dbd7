"""Layers shared out to stages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.core.errors import ConfigError
from distrain.core.vocabulary import PRESETS
from distrain.planners.stages import stage_layers, stage_params

quick = settings(max_examples=50, derandomize=True, deadline=None, database=None)


@quick
@given(num_layers=st.integers(1, 120), data=st.data())
def test_every_layer_is_on_one_stage_and_sizes_differ_by_one_at_most(
    num_layers: int, data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, num_layers))
    ranges = stage_layers(num_layers, num_stages)
    assert [layer for first, last in ranges for layer in range(first, last)] == list(range(num_layers))
    sizes = [last - first for first, last in ranges]
    assert max(sizes) - min(sizes) <= 1
    if num_stages > 2:
        assert sizes[-1] == min(sizes)
        assert sizes[0] == min(sizes) or num_layers % num_stages == num_stages - 1


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "sizes"),
    [(6, 4, [1, 2, 2, 1]), (7, 4, [2, 2, 2, 1]), (9, 4, [2, 2, 3, 2]), (3, 2, [2, 1]), (5, 1, [5])],
)
def test_the_ends_are_the_shorter_stages(num_layers: int, num_stages: int, sizes: list[int]) -> None:
    assert [last - first for first, last in stage_layers(num_layers, num_stages)] == sizes


@pytest.mark.parametrize(("num_layers", "num_stages"), [(2, 3), (2, 0), (0, 1)])
def test_a_stage_without_a_layer_is_refused(num_layers: int, num_stages: int) -> None:
    with pytest.raises(ConfigError, match="needs a layer"):
        stage_layers(num_layers, num_stages)


@pytest.mark.parametrize("preset", PRESETS)
def test_stages_add_up_to_the_model(preset: str) -> None:
    shape = PRESETS[preset]
    for num_stages in (1, 2):
        counts = stage_params(shape, stage_layers(shape.num_layers, num_stages))
        assert sum(counts) == shape.num_params
    assert counts[1] - counts[0] == shape.d_model
