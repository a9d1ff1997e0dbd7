"""The fit of the cost model: it finds the constants that made the times, disturbed ones or not, and refuses too few."""

from dataclasses import replace
from pathlib import Path

import pytest

from distrain.core.errors import ConfigError
from distrain.planners.sequence.cost import PRESETS, SequenceCost, load
from distrain.planners.sequence.fit import FASTEST_GB_S, Sample, bytes_per_token, fit

GROUPS = ((8192,), (4096,) * 2, (1024,) * 8, (65536,), (16384,) * 3, (2048,))
TRUE = replace(PRESETS["7b"], tokens_per_gpu=100_000, bandwidth_gb_s={2: 100.0, 4: 50.0, 8: 5.0})


def timed(cost: SequenceCost, *, slow: int | None = None) -> list[Sample]:
    """Every group at every degree; the one numbered ``slow`` took three times as long as it should."""
    shapes = [(degree, lengths) for degree in cost.degrees(8) for lengths in GROUPS]
    return [
        Sample(lengths, degree, cost.group_ms(lengths, degree) * (3 if index == slow else 1))
        for index, (degree, lengths) in enumerate(shapes)
    ]


@pytest.mark.parametrize("slow", [None, 0, 9, 23])
def test_the_constants_that_made_the_times_are_found_though_one_of_them_was_disturbed(
    slow: int | None,
) -> None:
    found = fit(timed(TRUE, slow=slow), layers=32, hidden=4096, tokens_per_gpu=100_000)
    for name in ("alpha1", "alpha2", "beta1"):
        assert getattr(found.cost, name) == pytest.approx(getattr(TRUE, name), rel=1e-5)
    assert found.cost.bandwidth_gb_s == pytest.approx(TRUE.bandwidth_gb_s, rel=1e-5)
    assert found.worst_error == pytest.approx(0 if slow is None else 2 / 3, abs=1e-5)
    assert found.mean_error == pytest.approx(found.worst_error / 24, abs=1e-5)


def test_communication_that_took_no_time_has_a_bandwidth_still(tmp_path: Path) -> None:
    free = replace(TRUE, bandwidth_gb_s={2: 1e12})
    found = fit(timed(free), layers=32, hidden=4096, tokens_per_gpu=100_000, max_degree=2).cost
    assert found.bandwidth_gb_s == {2: pytest.approx(FASTEST_GB_S)}
    (tmp_path / "cost.toml").write_text(found.to_toml())
    assert load(tmp_path / "cost.toml") == found


def test_times_that_fall_with_the_length_do_not_make_a_negative_cost() -> None:
    samples = [Sample((length,), 1, 100 - length) for length in (10, 20, 30, 40)]
    found = fit(samples, layers=1, hidden=8, tokens_per_gpu=64).cost
    assert min(found.alpha1, found.alpha2, found.beta1) >= 0


def test_what_cannot_be_fitted_is_refused_with_every_reason() -> None:
    with pytest.raises(ConfigError) as refused:
        fit(
            [Sample((10,), 1, 5.0), Sample((10,), 2, 0.0), Sample((), 1, 3.0)],
            layers=1,
            hidden=8,
            tokens_per_gpu=64,
        )
    text = str(refused.value)
    assert "ms=0.0" in text
    assert "lengths=()" in text
    assert "too few different groups" in text


def test_memory_is_what_stays_and_what_each_token_adds_whatever_one_sample_says() -> None:
    samples = [(tokens, 1000 + 7 * tokens) for tokens in (10, 20, 40, 80, 160)]
    assert bytes_per_token(samples) == (1000, 7)
    assert bytes_per_token([*samples, (320, 10**9)]) == (1000, 7)
    with pytest.raises(ConfigError, match="one number of tokens"):
        bytes_per_token([(10, 5), (10, 6)])
