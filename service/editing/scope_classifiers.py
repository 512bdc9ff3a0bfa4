"""The trained scope classifiers of a model, from the data folder and from trainings of the service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from service.kit.artifact_store import ArtifactStore, DirectoryStore
from service.weights.factors import SharedFactors
from service.weights.trained_scope import TrainedScope, deserialize_trained_scope

CLASSIFIERS_FOLDER = "classifiers"  # next to the folder of the statistics

#: the artifact of the newest training for a layer of a model; None without one
FindArtifact = Callable[[str, int], bytes | None]


def artifact_name(fingerprint: str, layer: int) -> str:
    """Return the name of the artifact of a training for a layer of a model."""
    return f"serac-{fingerprint[:32]}-{layer}.safetensors"


class ScopeClassifiers:
    """Finds the classifier of an edit. `sources` are asked in turn, and the newest artifact is used."""

    def __init__(self, folder: Path | None) -> None:
        self._store = None if folder is None else DirectoryStore(folder)
        self.sources: list[FindArtifact] = [] if self._store is None else [_read_from(self._store)]
        self.known: dict[str, SharedFactors] = {}  #: the classifiers that were found, by digest

    def keep(self, trained: TrainedScope) -> None:
        """Store a classifier in the data folder, if there is one, in place of the last one of its layer."""
        if self._store is not None:
            name = artifact_name(trained.fingerprint, trained.classifier.layer)
            self._store.put(name, trained.serialize())

    def newest(self, fingerprint: str, layer: int) -> TrainedScope | None:
        """Return the newest classifier for a layer of a model; None if there is none."""
        found = [data for source in self.sources if (data := source(fingerprint, layer)) is not None]
        trained = [t for t in map(deserialize_trained_scope, found) if t.fingerprint == fingerprint]
        if not trained:
            return None
        newest = max(trained, key=lambda t: t.trained_at)
        self.known[newest.classifier.digest] = newest.classifier
        return newest


def _read_from(store: ArtifactStore) -> FindArtifact:
    def find(fingerprint: str, layer: int) -> bytes | None:
        return store.get(artifact_name(fingerprint, layer))

    return find
