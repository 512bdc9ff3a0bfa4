"""The loss and the threshold of a scope classifier: service.training.scope_loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.training.scope_loss import balanced_loss, choose_threshold, share_open

unit = st.floats(0, 1)


def loss_by_definition(pairs: list[tuple[float, bool]]) -> float:
    """Half of the mean cross-entropy of each kind of pair, from phi itself."""
    inside = [-math.log(math.exp(-x)) for x, within in pairs if within]
    outside = [-math.log(1 - math.exp(-x)) for x, within in pairs if not within]
    return sum(sum(losses) / len(losses) / 2 for losses in (inside, outside) if losses)


@given(st.lists(st.tuples(st.floats(0.01, 20), st.booleans()), min_size=1, max_size=12))
def test_loss_is_the_balanced_cross_entropy_of_phi(pairs: list[tuple[float, bool]]) -> None:
    """The loss is that of the definition, with phi computed first."""
    exponents = torch.tensor([x for x, _ in pairs], dtype=torch.float64)
    within = torch.tensor([w for _, w in pairs])
    assert float(balanced_loss(exponents, within)) == pytest.approx(loss_by_definition(pairs), rel=1e-9)


def test_many_pairs_of_one_kind_count_as_few() -> None:
    """A hundred equal pairs out of scope have the share of one."""
    once = balanced_loss(torch.tensor([0.3, 0.7]), torch.tensor([True, False]))
    often = balanced_loss(torch.tensor([0.3] + [0.7] * 100), torch.tensor([True] + [False] * 100))
    torch.testing.assert_close(once, often)


def test_gradient_moves_pairs_of_one_scope_together_and_others_apart() -> None:
    """The loss falls when a pair within scope comes nearer, and when one out of scope goes away."""
    exponents = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    balanced_loss(exponents, torch.tensor([True, False, False])).backward()
    assert exponents.grad is not None
    assert exponents.grad[0] > 0 > exponents.grad[1]
    assert exponents.grad.isfinite().all()


@given(st.lists(unit, min_size=1, max_size=40), st.floats(0, 0.6))
def test_threshold_is_the_least_that_keeps_the_rate(values: list[float], rate: float) -> None:
    """At the threshold at most the rate opens, unless phi is 1; the next smaller phi would open too many."""
    phi = torch.tensor(values, dtype=torch.float64)
    threshold = choose_threshold(phi, rate)
    opened = share_open(phi, threshold)
    assert opened is not None
    if threshold < 1:
        assert opened <= rate
    lower = [v for v in values if v < threshold]
    if lower:
        more = share_open(phi, max(lower))
        assert more is not None and more > rate
    assert 0 <= threshold <= 1


def test_own_texts_open_at_every_threshold() -> None:
    """phi of a record's own texts is 1, and no threshold is above it."""
    assert choose_threshold(torch.ones(3, dtype=torch.float64), 0.0) == 1.0
    assert share_open(torch.ones(1, dtype=torch.float64), 1.0) == 1.0


def test_without_pairs_there_is_no_share() -> None:
    """Where nothing is measured the figure is missing, and not 0."""
    assert share_open(torch.empty(0), 0.5) is None
    assert choose_threshold(torch.empty(0, dtype=torch.float64), 0.01) == 0.0
