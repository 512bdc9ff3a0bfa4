"""Scope classifiers and records for tests."""

from __future__ import annotations

from typing import Any

import torch

from service.editing.context import EditorContext
from service.kit.statement_sentence import statement_sentence
from service.models.loading import LoadedModel
from service.models.prompt_features import reader_of
from service.weights.factors import StatementRecord
from service.weights.scope_classifier import ScopeClassifier
from service.weights.trained_scope import TrainedScope

_NAMES = (
    "Eiffel Tower",
    "Louvre",
    "Big Ben",
    "Colosseum",
    "Fuji",
    "Curie",
    "Paulo",
    "Rome",
    "London",
    "Japan",
)
#: records of ten subjects, of which a classifier can be trained
TRAINING_RECORDS: list[dict[str, Any]] = [
    {
        "subject": name,
        "prompt": "{} " + relation,
        "target_new": "Rome",
        "target_true": "Paris",
        "paraphrases": [f"They say that {name} {relation}", f"{name}, we know, {relation}"],
    }
    for name in _NAMES
    for relation in ("is located in", "was found in")
]


def random_classifier(
    width: int,
    dimensions: int = 4,
    layer: int = 0,
    seed: int = 0,
    threshold: float = 0.5,
    subject_threshold: float = 0.4,
) -> ScopeClassifier:
    """Return a classifier with random numbers."""
    g = torch.Generator().manual_seed(seed)
    center = torch.randn(width, generator=g)
    projection = torch.randn(dimensions, width, generator=g)
    return ScopeClassifier(layer, center, projection, 0.7, threshold, subject_threshold)


def record_of(
    model: LoadedModel,
    classifier: ScopeClassifier,
    edit: str,
    subject: str,
    prompt: str,
    target: str,
    names: tuple[str, ...] = (),
    threshold: float | None = None,
) -> StatementRecord:
    """Return the record of a statement, whose key is the embedding of its prompt."""
    feature = reader_of(model, classifier.layer).read(model.encode(prompt)[0])
    keys = classifier.embed(feature)[None]
    sentence = statement_sentence(prompt, " ", target) + "\n"
    chosen = classifier.threshold if threshold is None else threshold
    return StatementRecord(edit, subject, classifier, keys, sentence, names, chosen)


def give_classifier(context: EditorContext, classifier: ScopeClassifier) -> None:
    """Let edits of a context find a classifier, as if it had been trained for its model."""
    trained = TrainedScope(classifier, context.model.fingerprint, "2026-01-01T00:00:00.000+00:00", {})
    data = trained.serialize()
    context.classifiers.sources.append(lambda fingerprint, layer: data if layer == classifier.layer else None)
