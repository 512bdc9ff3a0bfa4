"""The scope classifier: service.weights.scope_classifier, service.weights.trained_scope."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from service.errors import InvalidInput
from service.weights.scope_classifier import ScopeClassifier, deserialize_scope_classifier
from service.weights.trained_scope import TrainedScope, deserialize_trained_scope
from tests.support.scopes import random_classifier

D, K = 6, 3


def classifier(seed: int = 0) -> ScopeClassifier:
    return random_classifier(D, K, layer=2, seed=seed)


def phi_by_definition(c: ScopeClassifier, x: list[float], texts: list[list[float]]) -> float:
    """exp(-s min_j |A (x - c) - A (t_j - c)|^2), entry by entry."""

    def e(features: list[float]) -> list[float]:
        shifted = [f - float(m) for f, m in zip(features, c.center, strict=True)]
        return [sum(float(a) * f for a, f in zip(row, shifted, strict=True)) for row in c.projection]

    distances = [sum((a - b) ** 2 for a, b in zip(e(x), e(t), strict=True)) for t in texts]
    return math.exp(-c.scale * min(distances))


def test_similarity_is_that_of_the_nearest_text() -> None:
    """phi is that of the definition, computed entry by entry."""
    c, g = classifier(), torch.Generator().manual_seed(1)
    x = torch.randn(D, generator=g)
    texts = torch.randn(4, 2, D, generator=g)
    found = c.similarity(c.embed(x), c.embed(texts))
    expected = [phi_by_definition(c, x.tolist(), t.tolist()) for t in texts]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_similarity_to_an_own_text_is_one() -> None:
    """The embedding of a record's own text has phi 1, to the bit."""
    c, feature = classifier(), torch.randn(D, generator=torch.Generator().manual_seed(2))
    keys = torch.stack([c.embed(feature + 1), c.embed(feature)])[None]
    assert c.similarity(c.embed(feature), keys).tolist() == [1.0]


def test_serialized_classifier_is_the_same() -> None:
    """A classifier that was stored decides as before, and has its digest."""
    c = classifier()
    again = deserialize_scope_classifier(c.serialize())
    assert again.digest == c.digest
    assert (again.layer, again.scale, again.threshold, again.subject_threshold) == (
        c.layer,
        c.scale,
        c.threshold,
        c.subject_threshold,
    )


def test_digest_covers_every_part() -> None:
    """A classifier that differs in one number, or in its layer, has another digest."""
    c = classifier()
    others = [
        replace(c, layer=1),
        replace(c, scale=c.scale * 2),
        replace(c, threshold=0.25),
        replace(c, subject_threshold=0.25),
        replace(c, center=c.center + 1),
        replace(c, projection=c.projection * 2),
    ]
    assert len({c.digest, *(o.digest for o in others)}) == 7


def test_trained_classifier_keeps_its_origin() -> None:
    """The artifact of a training has the model, the time and the figures."""
    trained = TrainedScope(classifier(), "f" * 64, "2026-01-01T00:00:00.000+00:00", {"figures": {"x": 1.5}})
    again = deserialize_trained_scope(trained.serialize())
    assert again.classifier.digest == trained.classifier.digest
    assert (again.fingerprint, again.trained_at, again.report) == (
        trained.fingerprint,
        trained.trained_at,
        trained.report,
    )


@pytest.mark.parametrize("data", [b"", b"x" * 40, classifier().serialize()])
def test_other_bytes_are_no_trained_classifier(data: bytes) -> None:
    """A file that is no artifact of a training is refused with what to do."""
    with pytest.raises(InvalidInput, match="train one again"):
        deserialize_trained_scope(data)
