"""Routes prompts by the records of SERAC that are active at a version (Mitchell et al. 2022, Section 3).

For the records i of a version with statements s_i, names N_i, thresholds t_i and similarities phi_i
(`service/weights/scope_classifier.py`), and a prompt x:

    open(x) = { i : x contains a name of N_i, or N_i is empty;  phi_i(x) >= t_i }
    i*      = argmax_{i in open(x)} phi_i(x)                      the newest edit among equals
    out(x)  = model("s_i* x")      if open(x) is not empty,       else model(x)

The published counterfactual model is a second, trained model. Here it is the served model itself, which reads the
statement before the prompt. A prompt is routed by its own tokens, in a pass of its own: the decision is a function of
the base model, the prompt and the set of records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from service.kit.names_in_text import NameFinder
from service.models.loading import LoadedModel
from service.models.prompt_features import FeatureReader, reader_of
from service.models.prompt_routing import PromptRoute
from service.weights.factors import StatementRecord


@dataclass(frozen=True)
class ScopeMatch:
    """How near a prompt is to a record."""

    record: StatementRecord
    similarity: float  #: phi

    @property
    def is_open(self) -> bool:
        return self.similarity >= self.record.threshold


class RecordRouter:
    """The records of one version. Implements `service.models.prompt_routing.PromptRouter`."""

    def __init__(self, model: LoadedModel, records: Sequence[StatementRecord]) -> None:
        self.records = tuple(sorted(records, key=lambda r: r.edit))
        self._model = model
        self._groups = list(_group_by_classifier(model, self.records))

    def route(self, prompt_ids: Sequence[int]) -> PromptRoute | None:
        matches = [m for m in self.matches(prompt_ids) if m.is_open]
        if not matches:
            return None
        nearest = max(matches, key=lambda m: (m.similarity, m.record.edit))
        return self._route_to(nearest.record, prompt_ids)

    def matches(self, prompt_ids: Sequence[int]) -> list[ScopeMatch]:
        """Return the similarity of each record whose names, if it has some, are in a prompt."""
        text = self._model.decode(list(prompt_ids))
        return [match for group in self._groups for match in group.matches(prompt_ids, text)]

    def _route_to(self, record: StatementRecord, prompt_ids: Sequence[int]) -> PromptRoute:
        leading = self._model.encode("")[0]
        statement_ids = self._model.encode(record.statement)[0][len(leading) :]
        place = len(leading) if list(prompt_ids[: len(leading)]) == leading else 0
        return PromptRoute(record.edit, tuple(statement_ids), place)


@dataclass(frozen=True)
class _ClassifierGroup:
    """The records of one classifier."""

    reader: FeatureReader
    records: tuple[StatementRecord, ...]

    @cached_property
    def _keys(self) -> Tensor:
        """(n, m, k): the keys of each record; a record with fewer repeats its last one."""
        most = max(len(r.keys) for r in self.records)
        padded = [torch.cat([r.keys, r.keys[-1:].expand(most - len(r.keys), -1)]) for r in self.records]
        return torch.stack(padded)

    @cached_property
    def _names(self) -> list[NameFinder | None]:
        return [NameFinder(r.names) if r.names else None for r in self.records]

    def matches(self, prompt_ids: Sequence[int], text: str) -> list[ScopeMatch]:
        named = [i for i, names in enumerate(self._names) if names is None or names.is_in(text)]
        if not named:
            return []
        classifier = self.records[0].classifier
        embedding = classifier.embed(self.reader.read(prompt_ids))
        similarities = classifier.similarity(embedding, self._keys[named]).tolist()
        return [ScopeMatch(self.records[i], phi) for i, phi in zip(named, similarities, strict=True)]


def _group_by_classifier(
    model: LoadedModel, records: Sequence[StatementRecord]
) -> Iterator[_ClassifierGroup]:
    ordered = sorted(records, key=lambda r: r.classifier.digest)
    for _, group in groupby(ordered, key=lambda r: r.classifier.digest):
        of_group = tuple(group)
        yield _ClassifierGroup(reader_of(model, of_group[0].layer), of_group)
