"""Plans of activations: cuts lie where they may, and survive other lengths and a file."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.core.errors import ConfigError
from distrain.planners.activation_plan import TOKENS, ActivationPlan, LayerPlan, Split, snap, uniform
from distrain.planners.activations import GROUPS

shares = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: (min(pair), max(pair) - min(pair)))


@given(num_tokens=st.integers(1, 10_000), share=shares)
def test_a_snapped_cut_is_allowed_and_never_holds_more_than_asked_for(
    num_tokens: int, share: tuple[float, float]
) -> None:
    keep, swap = share
    split = snap(num_tokens, keep=keep, swap=swap)
    ActivationPlan(
        layers=(LayerPlan.of(split, input=Split(keep=num_tokens), attention=Split(keep=num_tokens)),)
    )
    assert split.num_tokens == num_tokens
    assert split.keep + split.swap <= (keep + swap) * num_tokens + 1e-3 or keep + swap > 1 - 1e-9
    assert split.recompute <= (1 - keep - swap) * num_tokens + 2 * TOKENS


@given(num_tokens=st.integers(1, 5000), other=st.integers(1, 5000), share=shares)
def test_a_plan_at_another_length_is_an_allowed_plan(
    num_tokens: int, other: int, share: tuple[float, float]
) -> None:
    layer = LayerPlan.of(snap(num_tokens, keep=share[0], swap=share[1])).at(other)
    ActivationPlan(layers=(layer,))
    assert {split.num_tokens for split in layer.splits} == {other}
    assert layer.input == Split(swap=other)


def test_alpha_1_swaps_all_tokens_and_alpha_0_none() -> None:
    assert snap(1000, swap=1.0) == Split(swap=1000)
    assert snap(1000, swap=0.0) == Split(recompute=1000)
    assert snap(1000, swap=0.3) == Split(swap=256, recompute=744)
    assert snap(1000, swap=0.999) == Split(swap=768, recompute=232), "a tail has at least 128 tokens"


def test_modes_say_what_they_do_and_leave_the_last_two_layers_where_they_are() -> None:
    memo = uniform("memo", num_layers=4, num_tokens=512, alpha=0.5)
    assert [layer.keeps_all for layer in memo.layers] == [False, False, True, True]
    assert memo.layers[0].after_attention == Split(swap=256, recompute=256)
    assert not any(layer.recomputes for layer in uniform("swap", num_layers=4, num_tokens=512).layers)
    assert all(
        layer.attention.recompute for layer in uniform("recompute", num_layers=4, num_tokens=512).layers
    )
    assert all(layer.keeps_all for layer in uniform("none", num_layers=4, num_tokens=512).layers)
    with pytest.raises(ConfigError, match="no such activation mode"):
        uniform("mem", num_layers=4, num_tokens=512)


def test_a_plan_survives_a_file_and_equal_plans_have_equal_digests() -> None:
    plan = uniform("memo", num_layers=3, num_tokens=640, alpha=0.4)
    again = ActivationPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.digest == plan.digest
    assert uniform("memo", num_layers=3, num_tokens=640, alpha=0.8).digest != plan.digest


def test_a_policy_of_the_program_becomes_a_plan() -> None:
    plan = ActivationPlan.of_policy(
        kept=[[0, 512, 128, 0]],
        swapped=[[512, 0, 128, 256]],
        groups=GROUPS,
        num_tokens=512,
        host_bytes=7,
    )
    assert plan.host_bytes == 7
    assert plan.layers[0] == LayerPlan(
        input=Split(swap=512),
        attention=Split(keep=512),
        before_attention=Split(keep=128, swap=128, recompute=256),
        after_attention=Split(swap=256, recompute=256),
    )


def test_every_problem_of_a_plan_is_listed() -> None:
    bad = LayerPlan(
        input=Split(keep=128, recompute=384),
        attention=Split(swap=256, recompute=256),
        before_attention=Split(swap=100, recompute=412),
        after_attention=Split(swap=512),
    )
    with pytest.raises(ConfigError) as refused:
        ActivationPlan(layers=(bad,))
    assert [problem.error.partition(" ")[2][:14] for problem in refused.value.problems] == [
        "0's tokens are",
        "0 recomputes a",
        "0 would recomp",
    ]
