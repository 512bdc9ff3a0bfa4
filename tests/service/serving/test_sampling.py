"""Sampling against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.requests import Sampling
from service.serving.sampling import choose, distribution, draw, generator

torch.set_num_threads(1)

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


def brute(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """The definition, in plain Python: order the tokens, keep k, keep the least set of mass p, normalise."""
    scaled = [x / temperature for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[: top_k or len(logits)]
    total, kept, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= top_p - 1e-12 and top_p < 1:
            break
    left = sum(weights[i] for i in kept)
    return [weights[i] / left if i in kept else 0.0 for i in range(len(logits))]


@settings(max_examples=300, deadline=None)
@given(
    LOGITS,
    st.floats(0.05, 5),
    st.one_of(st.none(), st.integers(1, 15)),
    st.sampled_from([0.1, 0.37, 0.62, 0.9, 1.0]),
)
def test_the_distribution_is_that_of_the_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> None:
    """Temperature, then top-k, then top-p, as written down in plain Python."""
    wanted = brute(logits, temperature, top_k, top_p)
    found = distribution(torch.tensor(logits), temperature, top_k, top_p).tolist()
    if top_p < 1:  # a mass that reaches p only by rounding may fall either way
        steps = sorted((p for p in brute(logits, temperature, top_k, 1.0)), reverse=True)
        edges = [sum(steps[: i + 1]) for i in range(len(steps))]
        if any(abs(edge - top_p) < 1e-9 for edge in edges) or len(set(logits)) < len(logits):
            return
    assert found == pytest.approx(wanted, abs=1e-9)


def test_equals_are_kept_by_their_ids() -> None:
    """top_k keeps exactly k tokens, of equals the lower ids."""
    p = distribution(torch.tensor([1.0, 2.0, 2.0, 2.0]), 1.0, top_k=2)
    assert p.tolist() == pytest.approx([0, 0.5, 0.5, 0])


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_a_draw_is_the_inverse_of_the_distribution(logits: list[float], uniform: float) -> None:
    """The drawn token is the one in whose share of [0, 1) the number falls."""
    p = distribution(torch.tensor(logits), 1.0)
    token = draw(p, uniform)
    below, above = float(p[:token].sum()), float(p[: token + 1].sum())
    assert p[token] > 0
    assert below - 1e-12 <= uniform <= above + 1e-12


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_token_that_was_cut_is_never_drawn(uniform: float) -> None:
    """Not even at the ends of the unit interval."""
    p = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    assert draw(p, uniform) in (1, 3)


def test_frequencies_follow_the_distribution() -> None:
    """Over many draws of one generator, each token comes as often as it is probable (five standard deviations)."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    asked = Sampling(temperature=1.3, top_k=4, top_p=0.95)
    p = distribution(logits, 1.3, 4, 0.95)
    numbers, n = generator(7), 4000
    counts = torch.zeros(5, dtype=torch.float64)
    for _ in range(n):
        counts[choose(logits, asked, numbers)] += 1
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_temperature_zero_is_greedy_and_draws_nothing() -> None:
    """At temperature 0 the most probable token is taken, of equals the lowest, and the generator stays as it was."""
    numbers = generator(1)
    before = numbers.get_state()
    assert choose(torch.tensor([0.0, 3.0, 3.0]), Sampling(), numbers) == 1
    assert torch.equal(numbers.get_state(), before)


def test_extreme_logits_give_numbers() -> None:
    """A low temperature and wide logits overflow nothing."""
    p = distribution(torch.tensor([3e38, -3e38, 0.0]), 0.01)
    assert p.tolist() == [1, 0, 0]
