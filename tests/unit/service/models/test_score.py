"""Tests of service.models.score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from service.models.score import TargetScore, TokenScore, decisive_scores


def make_score(ids: Sequence[int], probabilities: Sequence[float], greedy: Sequence[bool]) -> TargetScore:
    """Return the score of an object from its tokens."""
    tokens = tuple(TokenScore(i, math.log(p), g) for i, p, g in zip(ids, probabilities, greedy, strict=True))
    mean = sum(t.log_p for t in tokens) / len(tokens)
    return TargetScore(mean, all(greedy), sum(greedy), len(tokens), tokens)


def test_tokens_after_the_first_difference_decide_nothing() -> None:
    """A long object whose later tokens are certain has a high mean per token, and leads only where its first token
    does."""
    new = make_score([5], [0.6], [True])
    long = make_score([1, 2, 3, 4], [0.2, 1.0, 1.0, 1.0], [False, True, True, True])
    assert math.exp(long.log_p) > 0.6
    decisive_new, decisive_long = decisive_scores(new, long)
    assert math.exp(decisive_new.lead) == pytest.approx(0.6)
    assert math.exp(decisive_long.lead) == pytest.approx(0.2)


def test_shared_tokens_belong_to_both() -> None:
    """Objects in one script of byte tokens share their first tokens: both leads contain them, and the first token that
    differs."""
    new = make_score([7, 8, 1, 2], [0.9, 0.9, 0.7, 0.99], [True, True, True, True])
    true = make_score([7, 8, 3], [0.9, 0.9, 0.1], [True, True, False])
    decisive_new, decisive_true = decisive_scores(new, true)
    assert math.exp(decisive_new.lead) == pytest.approx(0.9 * 0.9 * 0.7)
    assert math.exp(decisive_true.lead) == pytest.approx(0.9 * 0.9 * 0.1)
    assert decisive_new.said == decisive_new.lead


def test_an_object_that_the_model_does_not_complete_counts_as_a_whole() -> None:
    """When the model goes on with another token after the first difference, the probability that it says the object is
    the joint one of all tokens, however high the mean per token is."""
    new = make_score(range(6), [0.45] * 6, [True, True, False, True, True, True])
    decisive_new, _ = decisive_scores(new, make_score([9], [0.1], [False]))
    assert math.exp(new.log_p) == pytest.approx(0.45)
    assert math.exp(decisive_new.lead) == pytest.approx(0.45)
    assert math.exp(decisive_new.said) == pytest.approx(0.45**6)


def test_an_object_that_begins_another_one() -> None:
    """Of "New York" and "New York City" the shorter one has what the longer one leaves of its probability."""
    short = make_score([1, 2], [0.8, 0.9], [True, True])
    long = make_score([1, 2, 3], [0.8, 0.9, 0.7], [True, True, True])
    decisive_short, decisive_long = decisive_scores(short, long)
    assert math.exp(decisive_short.lead) == pytest.approx(0.8 * 0.9 * 0.3)
    assert math.exp(decisive_long.lead) == pytest.approx(0.8 * 0.9 * 0.7)
    assert decisive_scores(long, short) == (decisive_long, decisive_short)


def test_equal_objects_count_as_a_whole() -> None:
    """An object against itself has its joint probability, so that neither leads."""
    score = make_score([1, 2], [0.8, 0.9], [True, False])
    one, other = decisive_scores(score, score)
    assert one == other
    assert math.exp(one.said) == pytest.approx(0.72)
