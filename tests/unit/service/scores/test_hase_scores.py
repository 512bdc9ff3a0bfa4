"""Scores of Hase et al.: service.scores.hase_scores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scores.hase_scores import MIN_REWRITE_SHARE, erasure_share, preserved_share, rewrite_share

P = st.floats(0, 1)


def test_by_hand() -> None:
    """From .2 to .6 is half of the possible gain; from .8 to .2 three quarters are gone; .9 may fall by at most .9."""
    assert rewrite_share(0.2, 0.6) == pytest.approx(0.5)
    assert erasure_share(0.8, 0.2) == pytest.approx(0.75)
    assert preserved_share(0.9, 0.45) == pytest.approx(0.5)


@given(P)
def test_the_ends(p: float) -> None:
    """All that was possible is 1, no change is nothing for the edit and 1 for its neighbours."""
    assert rewrite_share(p, 1.0) == 1.0
    assert erasure_share(max(p, 1e-9), 0.0) == 1.0
    assert erasure_share(p, p) == 0.0
    assert preserved_share(p, p) == 1.0
    if p < 1:
        assert rewrite_share(p, p) == MIN_REWRITE_SHARE


@given(P, P)
def test_shares_stay_within_their_bounds(before: float, after: float) -> None:
    """Whatever the probabilities, a share is between 0 and 1: the wrong direction is no success, not a negative one."""
    for share in (rewrite_share, erasure_share, preserved_share):
        assert -1e-12 <= share(before, after) <= 1


@given(P)
def test_the_greatest_possible_change_leaves_nothing(before: float) -> None:
    """A neighbour that goes as far as it can, to 0 or to 1, is not kept at all."""
    assert preserved_share(before, float(before < 0.5)) == pytest.approx(0, abs=1e-12)
