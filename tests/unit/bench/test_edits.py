"""Comparison of two edits, and the contexts of both implementations: bench/edits.py."""

from __future__ import annotations

import pytest
import torch

from bench.edits import context_prefixes, cosine, published_parameters
from service.covariance.corpus import Corpus
from service.weights.factors import LowRank
from tests.support.tiny_models import tiny


def test_the_cosine_is_that_of_the_dense_updates() -> None:
    """The cosine equals that of the dense updates and does not depend on the scale of the factors."""
    generator = torch.Generator().manual_seed(0)
    a, b = (
        LowRank(
            torch.randn(5, 1, dtype=torch.float64, generator=generator),
            torch.randn(1, 7, dtype=torch.float64, generator=generator),
        )
        for _ in range(2)
    )
    dense = torch.cosine_similarity(a.dense().flatten(), b.dense().flatten(), dim=0)
    assert cosine(a, b) == pytest.approx(dense.item())
    assert cosine(a, LowRank(a.left * 3, a.right / 3)) == pytest.approx(1)


def test_contexts_have_no_braces() -> None:
    """Contexts have two lengths and contain no braces."""
    model = tiny("gpt2")
    texts = ("In which {country} is Mount Fuji? It rises in Japan.",) * 4
    prefixes = context_prefixes(model, Corpus("", texts), 4)
    assert len(prefixes) == 4 and len(prefixes[0]) > len(prefixes[-1]) > 0
    assert not any(brace in text for text in prefixes for brace in "{}")


def test_both_sides_edit_where_such_a_model_is_edited() -> None:
    """Parameters have the published form of the key. The layer is the published one, or an early layer for an
    unknown model."""
    model = tiny("gpt2", layers=8)
    assert published_parameters("gpt2-xl", model).layers == (17,)
    assert published_parameters("tiny", model).layers == (2,)
    assert published_parameters("tiny", model).compat == "meng2022"
