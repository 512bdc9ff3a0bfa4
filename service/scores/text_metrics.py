"""Measures of generated texts: fluency (GE) and consistency with reference texts (RS) of CounterFact (Meng et al.
2022).

The published code splits words with NLTK. Here a word is a run of word characters or one other character, so that
figures are not comparable with published ones.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

WORD_OR_PUNCTUATION = re.compile(r"\w+|[^\w\s]")
TFIDF_TERM = re.compile(r"\b\w\w+\b")  # words of at least two characters


def ngram_entropy(text: str, n: int) -> float:
    """Return the entropy in bits of a text's n-grams. It is 0 if all are equal, or the text has fewer than n words."""
    words = WORD_OR_PUNCTUATION.findall(text)
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -math.fsum(c / total * math.log2(c / total) for c in counts.values())


def fluency(texts: Sequence[str]) -> float | None:
    """Return GE, the mean over texts of H_2 / 3 + 2 H_3 / 3, None without texts.

    Published figures are 100 times this.
    """
    if not texts:
        return None
    return math.fsum(ngram_entropy(t, 2) / 3 + 2 * ngram_entropy(t, 3) / 3 for t in texts) / len(texts)


class TfIdf:
    """TF-IDF weights from a corpus of n texts, df of which contain a word: tf * (ln((1 + n) / (1 + df)) + 1).

    Words outside the corpus have weight 0. The formula is that of scikit-learn's TfidfVectorizer.
    """

    def __init__(self, corpus: Sequence[str]) -> None:
        frequency = Counter(word for text in corpus for word in set(_terms(text)))
        self._idf = {w: math.log((1 + len(corpus)) / (1 + df)) + 1 for w, df in frequency.items()}

    def vector(self, text: str) -> dict[str, float]:
        """Return the weights of a text's words as a vector of norm 1, empty if the corpus has none of them."""
        counts = Counter(w for w in _terms(text) if w in self._idf)
        weights = {w: c * self._idf[w] for w, c in counts.items()}
        length = math.hypot(*weights.values())
        return {w: x / length for w, x in weights.items()}

    def similarity(self, one: Sequence[str], other: Sequence[str]) -> float | None:
        """Return RS, the cosine of two groups of texts, each joined. None if either is empty."""
        if not one or not other:
            return None
        a, b = self.vector(" ".join(one)), self.vector(" ".join(other))
        return math.fsum(x * b[w] for w, x in a.items() if w in b)


def _terms(text: str) -> list[str]:
    return TFIDF_TERM.findall(text.lower())
