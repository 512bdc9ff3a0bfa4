"""The sampler compared with a reference implementation, and a batch with one row at a time:
service.engine.sampler."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.engine.sampler import FIRST_TOP_K, INVALID_TOKEN, Sampler, choice_seed, draw, uniforms
from service.schemas import Sampling
from tests.support.reference_sampler import distribution, sample_token

torch.set_num_threads(1)

CPU = torch.device("cpu")
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)
SAMPLING_PARAMS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 3, 40, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
)


def sampler_distribution(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """Return the sampler's probabilities of the tokens of one row (V,), normalized to a sum of 1."""
    params = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    p = Sampler([params], CPU).probabilities(logits[None])[0]
    return p / p.sum()


def draw_one(p: Tensor, uniform: float) -> int:
    return int(draw(p[None], torch.tensor([uniform], dtype=torch.float64)))


def reference_distribution(
    logits: list[float], temperature: float, top_k: int | None, top_p: float
) -> list[float]:
    """The definition in plain Python: order the tokens, keep k, keep the smallest set of mass p,
    normalize."""
    scaled = [x / temperature for x in logits]
    weights = [math.exp(x - max(scaled)) for x in scaled]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[: top_k or len(logits)]
    total, kept_ids, mass = sum(weights[i] for i in order), [], 0.0
    for i in order:
        kept_ids.append(i)
        mass += weights[i] / total
        if mass >= top_p - 1e-12 and top_p < 1:
            break
    kept_mass = sum(weights[i] for i in kept_ids)
    return [weights[i] / kept_mass if i in kept_ids else 0.0 for i in range(len(logits))]


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
    """Temperature, top-k and top-p, applied in this order, give the distribution of the definition in plain
    Python."""
    expected = reference_distribution(logits, temperature, top_k, top_p)
    actual = sampler_distribution(torch.tensor(logits), temperature, top_k, top_p).tolist()
    if top_p < 1:  # rounding decides if a mass reaches p
        steps = sorted((p for p in reference_distribution(logits, temperature, top_k, 1.0)), reverse=True)
        edges = [sum(steps[: i + 1]) for i in range(len(steps))]
        if any(abs(edge - top_p) < 1e-9 for edge in edges) or len(set(logits)) < len(logits):
            return
    assert actual == pytest.approx(expected, abs=1e-9)


def test_top_k_ties_keep_the_lower_ids() -> None:
    """top_k keeps exactly k tokens; of tokens with equal logits it keeps the lower ids."""
    p = sampler_distribution(torch.tensor([1.0, 2.0, 2.0, 2.0]), 1.0, top_k=2)
    assert p.tolist() == pytest.approx([0, 0.5, 0.5, 0])


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_a_draw_is_the_inverse_of_the_distribution(logits: list[float], uniform: float) -> None:
    """The drawn token is the one whose interval of the cumulative distribution contains the number."""
    p = sampler_distribution(torch.tensor(logits), 1.0)
    token = draw_one(p, uniform)
    below, above = float(p[:token].sum()), float(p[: token + 1].sum())
    assert p[token] > 0
    assert below - 1e-12 <= uniform <= above + 1e-12


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_filtered_token_is_never_drawn(uniform: float) -> None:
    """A filtered token is not drawn, also at the ends of the unit interval."""
    p = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    assert draw_one(p, uniform) in (1, 3)


def test_frequencies_follow_the_distribution() -> None:
    """Over many draws the frequency of each token is within five standard deviations of its probability."""
    logits, n = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]), 4000
    p = sampler_distribution(logits, 1.3, 4, 0.95)
    sampler = Sampler([Sampling(temperature=1.3, top_k=4, top_p=0.95)] * n, CPU)
    tokens = sampler(logits.expand(n, -1), torch.tensor(uniforms(7, n), dtype=torch.float64))
    counts = tokens.bincount(minlength=5)
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(SAMPLING_PARAMS, min_size=1, max_size=6),
    st.integers(0, 2**32),
    st.sampled_from([5, 60, 900]),
    st.booleans(),
)
def test_a_batch_draws_what_each_row_draws_alone(
    params: list[Sampling], seed: int, size: int, waits: bool
) -> None:
    """Rows with different sampling parameters in one batch get the tokens that the reference draws for each
    alone, with and without synchronization with the device."""
    source = torch.Generator().manual_seed(seed)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(params))]
    uniform_numbers = torch.tensor([uniforms(seed + i, 4) for i in range(len(params))], dtype=torch.float64)
    sampler = Sampler(params, CPU)
    sampler._avoid_sync = waits
    for step in range(4):
        logits = (torch.randn(len(params), size, generator=source) * 4).round(decimals=step % 2)
        slow = [
            sample_token(x, a, g)
            for x, a, g in zip(logits, params, generators, strict=True)
            if a.temperature > 0
        ]
        fast = sampler(logits, uniform_numbers[:, step]).tolist()
        assert [t for t, a in zip(fast, params, strict=True) if a.temperature > 0] == slow
        assert [t for t, a in zip(fast, params, strict=True) if a.temperature == 0] == [
            int(x.argmax()) for x, a in zip(logits, params, strict=True) if a.temperature == 0
        ]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_top_p_of_any_size_matches_full_sort(top_p: float, scale: float) -> None:
    """The tokens that top_p keeps are those of a full sort, from a few tokens to nearly all."""
    logits = torch.randn(20 * FIRST_TOP_K, generator=torch.Generator().manual_seed(1)) * scale
    torch.testing.assert_close(
        sampler_distribution(logits, 1.0, None, top_p),
        distribution(logits, 1.0, None, top_p),
        rtol=1e-12,
        atol=0,
    )


def test_uniforms_do_not_depend_on_count() -> None:
    """The numbers of a seed are those that its generator gives one by one, for any count."""
    numbers = torch.Generator().manual_seed(3)
    wanted = [torch.rand((), dtype=torch.float64, generator=numbers).item() for _ in range(40)]
    assert all(uniforms(3, n) == wanted[:n] for n in (1, 7, 16, 40))


def test_temperature_zero_is_greedy() -> None:
    """At temperature 0 the most probable token is chosen; of equals the one with the lowest id."""
    assert Sampler([Sampling()], CPU)(torch.tensor([[0.0, 3.0, 3.0]]), torch.zeros(1)).tolist() == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_give_no_token(bad: float) -> None:
    """A row with a NaN or infinite logit gets INVALID_TOKEN, and the other rows get their tokens."""
    logits = torch.tensor([[1.0, bad, 0.0], [0.0, 0.0, 9.0], [bad, 0.0, 0.0]])
    params = [Sampling(temperature=1.0, top_p=0.5), Sampling(temperature=0.1, top_k=2), Sampling()]
    assert Sampler(params, CPU)(logits, torch.full((3,), 0.5).double()).tolist() == [
        INVALID_TOKEN,
        2,
        INVALID_TOKEN,
    ]


def test_extreme_logits_give_numbers() -> None:
    """A low temperature and extreme logits do not overflow."""
    assert sampler_distribution(torch.tensor([3e38, -3e38, 0.0]), 0.01).tolist() == [1, 0, 0]


@given(
    st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=12),
    st.floats(5e-324, 10),
    st.one_of(st.none(), st.integers(1, 15)),
    st.sampled_from([1e-9, 0.5, 1.0]),
    st.floats(0, 1, exclude_max=True),
)
def test_any_accepted_parameters_draw_a_token_of_the_vocabulary(
    logits: list[float], temperature: float, top_k: int | None, top_p: float, uniform: float
) -> None:
    """For finite logits, every temperature above 0, also the smallest number, gives a token of the vocabulary."""
    params = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = Sampler([params], CPU)(torch.tensor([logits]), torch.tensor([uniform], dtype=torch.float64))
    assert 0 <= int(tokens) < len(logits)


def test_smallest_temperature_is_greedy() -> None:
    """At the smallest temperature above 0 the most probable token is drawn."""
    sampler = Sampler([Sampling(temperature=5e-324)], CPU)
    uniform = torch.tensor([0.999], dtype=torch.float64)
    assert sampler(torch.tensor([[1.0, 3.0, 2.0]]), uniform).tolist() == [1]


def test_distribution_without_mass_gives_no_token() -> None:
    """A row whose probabilities are 0 or not numbers gives INVALID_TOKEN; other rows are drawn."""
    p = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [0.25, 0.75]], dtype=torch.float64)
    tokens = draw(p, torch.full((4,), 0.5, dtype=torch.float64))
    assert tokens.tolist() == [INVALID_TOKEN] * 3 + [1]


def test_choice_seeds_are_distinct() -> None:
    """The first choice has the request's seed. The seeds of all choices of several requests are distinct and
    valid."""
    seeds = {choice_seed(seed, choice) for seed in (0, 1, 2**63 - 1) for choice in range(64)}
    assert len(seeds) == 3 * 64
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert [choice_seed(seed, 0) for seed in (0, 7)] == [0, 7]
    assert choice_seed(7, 1) == 3825955368494240696  # fixed, so that outputs stay reproducible
