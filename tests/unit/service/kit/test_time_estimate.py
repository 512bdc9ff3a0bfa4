"""Estimates of the time left: service.kit.time_estimate."""

from __future__ import annotations

import pytest

from service.kit import time_estimate
from service.kit.steps import Phase, Progress, Stepper, run_steps
from service.kit.time_estimate import TimeEstimate, with_estimate


def test_the_rest_takes_as_long_per_share_as_what_is_done() -> None:
    """A resumed work counts only what was done since; before enough is done there is no estimate."""
    estimate = TimeEstimate()
    assert estimate.seconds_left(0.4, now=100.0) is None
    assert estimate.seconds_left(0.41, now=101.0) is None
    assert estimate.seconds_left(0.5, now=110.0) == pytest.approx(50.0)
    assert estimate.seconds_left(1.0, now=160.0) == 0.0


def test_phases_count_by_their_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the first of two phases that cost three to one is three eighths of the work; other phases have no
    estimate."""
    shares: list[float] = []
    monkeypatch.setattr(time_estimate.TimeEstimate, "seconds_left", lambda _, share: shares.append(share))

    def steps() -> Stepper[None]:
        yield Progress(Phase.CORPUS, 1, 2)
        yield Progress(Phase.STATISTICS, 1, 2)
        yield Progress(Phase.FACTORIZE, 1, 2)

    run_steps(with_estimate(steps(), {Phase.CORPUS: 3.0, Phase.STATISTICS: 1.0}))
    assert shares == [3 / 8, 7 / 8]
