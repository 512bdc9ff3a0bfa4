"""The classifiers of a model: service.editing.scope_classifiers."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.editing.scope_classifiers import ScopeClassifiers, artifact_name
from service.errors import InvalidInput
from service.weights.trained_scope import TrainedScope
from tests.support.scopes import random_classifier

FINGERPRINT = "f" * 64


def trained(seed: int, hour: int, fingerprint: str = FINGERPRINT, layer: int = 1) -> TrainedScope:
    classifier = random_classifier(6, layer=layer, seed=seed)
    return TrainedScope(classifier, fingerprint, f"2026-01-01T{hour:02}:00:00.000+00:00", {})


def test_newest_of_all_sources_is_used(tmp_path: Path) -> None:
    """Of the classifier in the data folder and that of a training of the service the newer one is used."""
    classifiers, served = ScopeClassifiers(tmp_path), trained(2, hour=5).serialize()
    classifiers.sources.append(lambda _fingerprint, _layer: served)
    for hour, digest in ((4, trained(2, 5).classifier.digest), (6, trained(1, 6).classifier.digest)):
        classifiers.keep(trained(1, hour))
        found = classifiers.newest(FINGERPRINT, 1)
        assert found is not None and found.classifier.digest == digest
        assert classifiers.known[digest] is found.classifier


def test_classifiers_are_found_by_model_and_layer(tmp_path: Path) -> None:
    """A classifier for another layer or another model is not used."""
    classifiers = ScopeClassifiers(tmp_path)
    classifiers.keep(trained(1, 1))
    assert classifiers.newest(FINGERPRINT, 0) is None
    assert classifiers.newest("f" * 32 + "0" * 32, 1) is None
    assert classifiers.newest(FINGERPRINT, 1) is not None


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    """A file that is no classifier is an error that says what to do, not a missing classifier."""
    (tmp_path / artifact_name(FINGERPRINT, 1)).write_bytes(b"12345678{}")
    with pytest.raises(InvalidInput, match="train one again"):
        ScopeClassifiers(tmp_path).newest(FINGERPRINT, 1)


def test_without_a_folder_nothing_is_kept() -> None:
    """A context without a data folder has the classifiers of its other sources alone."""
    classifiers = ScopeClassifiers(None)
    classifiers.keep(trained(1, 1))
    assert classifiers.newest(FINGERPRINT, 1) is None
