"""Fluency and consistency of texts: service.scores.text_metrics."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scores.text_metrics import TfIdf, fluency, ngram_entropy


def test_entropy_by_hand() -> None:
    """Of the bigrams ab, ba, ab, bc two are equal: 1.5 bits. Punctuation marks are words."""
    assert ngram_entropy("a b a b c", 2) == pytest.approx(1.5)
    assert ngram_entropy("a b a b c", 3) == pytest.approx(math.log2(3))
    assert ngram_entropy("Rome, Rome, Rome,", 1) == pytest.approx(1.0)


def test_entropy_of_repetition_is_0() -> None:
    """A text of one repeated n-gram, or with fewer than n words, has entropy 0."""
    assert ngram_entropy("the " * 30, 2) == 0
    assert ngram_entropy("one", 2) == ngram_entropy("", 3) == 0


@given(st.integers(3, 200))
def test_entropy_of_distinct_ngrams(count: int) -> None:
    """The entropy of m distinct n-grams is log2 m."""
    text = " ".join(f"w{i}" for i in range(count))
    expected = math.log2(count - 1) / 3 + 2 * math.log2(count - 2) / 3
    assert fluency([text]) == pytest.approx(expected)


def test_fluency_is_averaged_over_texts() -> None:
    """Bigrams weigh 1/3 and trigrams 2/3. Without texts fluency is None."""
    one = (1.5 + 2 * math.log2(3)) / 3
    assert fluency(["a b a b c", "x x x x"]) == pytest.approx(one / 2)
    assert fluency([]) is None


def test_tf_idf_by_hand() -> None:
    """Weights and cosine of two texts match the definition in scikit-learn's documentation."""
    found = TfIdf(["rome rome italy", "paris italy"])
    rare = math.log(3 / 2) + 1  # in one text of two; a word in both weighs 1
    assert found.vector("Rome rome Italy, unknown x") == pytest.approx(
        {"rome": 2 * rare / math.hypot(2 * rare, 1), "italy": 1 / math.hypot(2 * rare, 1)}
    )
    expected = 1 / (math.hypot(2 * rare, 1) * math.hypot(rare, 1))
    assert found.similarity(["rome rome", "italy"], ["paris italy"]) == pytest.approx(expected)


def test_similarity_at_the_bounds() -> None:
    """The same words in another order have similarity 1, disjoint texts 0, and no text None."""
    found = TfIdf(["one two three", "four five"])
    assert found.similarity(["one two"], ["two one"]) == pytest.approx(1)
    assert found.similarity(["one two"], ["four"]) == 0
    assert found.similarity(["unheard of"], ["four"]) == 0
    assert found.similarity([], ["four"]) is found.similarity(["four"], []) is None
