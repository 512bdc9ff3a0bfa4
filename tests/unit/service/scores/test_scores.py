"""ES, PS, NS and S: service.scores.scores."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import harmonic_mean as reference

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scores.scores import (
    BootstrapResampler,
    bootstrap_mean,
    bootstrap_score,
    harmonic_mean,
    probability_margin,
    share_preferring_new,
    share_preferring_true,
    token_accuracy,
)

LOG_P = st.sampled_from([-0.5, -1.0, -2.0, -8.0])
PAIRS = st.lists(st.tuples(LOG_P, LOG_P), min_size=1, max_size=10)
SHARE = st.floats(0.01, 1)


def test_shares_by_hand() -> None:
    """Of four prompts two prefer the new object, one the true one, and one is a tie."""
    pairs = [(-1.0, -2.0), (-0.1, -3.0), (-2.0, -1.0), (-1.5, -1.5)]
    assert share_preferring_new(pairs) == 0.5
    assert share_preferring_true(pairs) == 0.25


def test_ties_are_failures() -> None:
    """Equal probabilities count as failures in ES, PS and NS."""
    assert share_preferring_new([(-1.0, -1.0)]) == 0.0
    assert share_preferring_true([(-1.0, -1.0)]) == 0.0


def test_no_prompts_give_no_score() -> None:
    """A share over no prompts is None."""
    assert share_preferring_new([]) is None
    assert share_preferring_true([]) is None


def test_nan_is_a_failure() -> None:
    """A NaN log-probability counts as a failure."""
    nan = float("nan")
    assert share_preferring_new([(nan, -1.0), (-1.0, nan)]) == 0.0
    assert share_preferring_true([(nan, -1.0), (-1.0, nan)]) == 0.0


@given(PAIRS)
def test_swapping_the_objects_inverts_the_share(pairs: list[tuple[float, float]]) -> None:
    """With new and true object swapped ES becomes 1 - ES - the share of ties."""
    swapped = [(true, new) for new, true in pairs]
    ties = Fraction(sum(new == true for new, true in pairs), len(pairs))
    share, turned = share_preferring_new(pairs), share_preferring_new(swapped)
    assert share is not None and turned == pytest.approx(1 - share - float(ties))
    assert share_preferring_true(pairs) == turned


@given(st.lists(SHARE, min_size=1, max_size=5))
def test_harmonic_mean_matches_its_definition(values: list[float]) -> None:
    """The harmonic mean is n over the sum of reciprocals, between least and greatest value."""
    assert harmonic_mean(values) == pytest.approx(reference(values))
    assert min(values) - 1e-9 <= harmonic_mean(values) <= max(values) + 1e-9


def test_harmonic_mean_with_a_zero_is_zero() -> None:
    """The harmonic mean is 0 if a value is 0."""
    assert harmonic_mean([1.0, 0.0, 1.0]) == 0.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 99))
def test_interval_contains_the_mean(records: list[float], seed: int) -> None:
    """The interval contains the mean of the records, and a seed gives the same interval again."""
    mean, low, high = bootstrap_mean(records, rounds=200, seed=seed)
    assert mean == pytest.approx(sum(records) / len(records))
    assert low - 1e-9 <= high
    assert min(records) - 1e-9 <= low and high <= max(records) + 1e-9
    assert (mean, low, high) == bootstrap_mean(records, rounds=200, seed=seed)


def test_interval_width_matches_the_standard_error() -> None:
    """The interval of a share of one half has about 1.96 standard errors on each side."""
    few, many = bootstrap_mean([0.0, 1.0] * 20), bootstrap_mean([0.0, 1.0] * 500)
    for mean, low, high in (few, many):
        assert low < mean < high
    assert many[2] - many[1] == pytest.approx(2 * 1.96 * 0.5 / 1000**0.5, rel=0.1)
    assert few[2] - few[1] > 3 * (many[2] - many[1])


def test_score_is_combined_after_averaging() -> None:
    """S is the harmonic mean of the three means, not the mean of S over records."""
    records = [(1.0, 0.5, 1.0), (1.0, 1.0, 0.8), (0.0, 0.5, 0.9)]
    score, low, high = bootstrap_score(records, rounds=200)
    assert score == pytest.approx(reference([2 / 3, 2 / 3, 0.9]))
    assert low <= score <= high


def test_margins_by_hand() -> None:
    """.5 - .25 and .125 - .25 have the mean .0625."""
    pairs = [(math.log(0.5), math.log(0.25)), (math.log(0.125), math.log(0.25))]
    assert probability_margin(pairs) == pytest.approx(0.0625)
    assert probability_margin([]) is None


def test_accuracy_counts_tokens() -> None:
    """Two of two tokens and none of three are two of five, not one half."""
    assert token_accuracy([(2, 2), (0, 3)]) == pytest.approx(0.4)
    assert token_accuracy([]) is None


def test_records_without_a_value_are_left_out() -> None:
    """A measure is averaged over the records that have it, and S combines those means."""
    columns: list[list[float | None]] = [[1.0, 0.0, 1.0, 1.0], [0.5, None, None, 0.5], [None, 1.0, 1.0, 1.0]]
    drawn = BootstrapResampler(4, 400)
    means = [drawn.interval(c) for c in columns]
    assert [m[0] for m in means if m] == [0.75, 0.5, 1.0]
    score = drawn.combined_interval(columns)
    assert score is not None and score[0] == pytest.approx(reference([0.75, 0.5, 1.0]))
    assert score[1] <= score[0] <= score[2]
    assert drawn.interval([None] * 4) is None
    assert drawn.combined_interval([[1.0] * 4, [None] * 4]) is None


def test_single_record_has_an_interval_of_width_0() -> None:
    """Both bounds of the interval of a single record are its value."""
    assert bootstrap_mean([0.25]) == (0.25, 0.25, 0.25)
    assert bootstrap_score([(1.0, 1.0, 1.0)]) == (1.0, 1.0, 1.0)
