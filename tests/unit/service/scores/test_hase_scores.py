"""Scores of Hase et al.: service.scores.hase_scores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scores.hase_scores import MIN_REWRITE_SHARE, erasure_share, preserved_share, rewrite_share

P = st.floats(0, 1)


def test_shares_by_hand() -> None:
    """From .2 to .6 is half of the possible increase, from .8 to .2 is three quarters erased, and .9 can change by at
    most .9.
    """
    assert rewrite_share(0.2, 0.6) == pytest.approx(0.5)
    assert erasure_share(0.8, 0.2) == pytest.approx(0.75)
    assert preserved_share(0.9, 0.45) == pytest.approx(0.5)


@given(P)
def test_shares_at_the_bounds(p: float) -> None:
    """The greatest possible change is 1. No change is 0 for an edit and 1 for a neighbour."""
    assert rewrite_share(p, 1.0) == 1.0
    assert erasure_share(max(p, 1e-9), 0.0) == 1.0
    assert erasure_share(p, p) == 0.0
    assert preserved_share(p, p) == 1.0
    if p < 1:
        assert rewrite_share(p, p) == MIN_REWRITE_SHARE


@given(P, P)
def test_shares_are_between_0_and_1(before: float, after: float) -> None:
    """Shares are between 0 and 1 for all probabilities, also for a change in the wrong direction."""
    for share in (rewrite_share, erasure_share, preserved_share):
        assert -1e-12 <= share(before, after) <= 1


@given(P)
def test_greatest_change_of_a_neighbour_is_0(before: float) -> None:
    """A neighbour whose probability changes as far as possible has the share 0."""
    assert preserved_share(before, float(before < 0.5)) == pytest.approx(0, abs=1e-12)
