"""Training a scope classifier: service.training.scope_training, service.training.scope_figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.datasets.record import Record
from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, advance, run_to_completion
from service.models.prompt_features import reader_of
from service.schemas import ScopePlan
from service.training.scope_examples import scope_facts, split_by_subject
from service.training.scope_figures import ScopeMeasurement, measure_scope
from service.training.scope_training import STEPS_PER_STATE, train_scope
from service.weights.trained_scope import TrainedScope
from tests.support.in_memory_store import InMemoryStore
from tests.support.tiny_models import tiny

MODEL = tiny("gpt2", seed=21)
RELATIONS = ("is located in the city of", "has the mother tongue", "was born in the country")
NAMES = (
    "Eiffel",
    "Ben",
    "Marie",
    "Fuji",
    "Paulo",
    "Tower",
    "Curie",
    "Mount",
    "Big",
    "London",
    "Rome",
    "Japan",
)


def some_records() -> list[Record]:
    """Facts of twelve subjects with three relations, each with two paraphrases."""
    return [
        Record(
            f"{name} {r}",
            name,
            "{} " + relation,
            "Rome",
            "Paris",
            (f"We know that {name} {relation}", f"{name}, as they say, {relation}"),
            relation=relation,
        )
        for name in NAMES
        for r, relation in enumerate(RELATIONS)
    ]


def plan(**changes: Any) -> ScopePlan:
    return ScopePlan.model_validate(
        {"layer": 1, "dimensions": 8, "steps": 60, "batch_size": 16, "false_open_rate": 0.1} | changes
    )


def train(store: InMemoryStore | None = None, **changes: Any) -> TrainedScope:
    steps = train_scope(MODEL, some_records(), plan(**changes), InMemoryStore() if store is None else store)
    return run_to_completion(steps)


def separation(trained: TrainedScope) -> float:
    """Mean phi of pairs within scope less that of pairs out of it, of the subjects that were held out."""
    split = split_by_subject(scope_facts(some_records()), 0)
    reader = reader_of(MODEL, 1)

    def read(texts: Any) -> torch.Tensor:
        return torch.stack([reader.read(MODEL.encode(t)[0]) for t in texts])

    measured = run_to_completion(measure_scope(trained.classifier, read, split.measured, (), 0))
    return float(
        measured.similarities[measured.within].mean() - measured.similarities[~measured.within].mean()
    )


def test_training_separates_subjects_that_it_has_not_seen() -> None:
    """More steps separate texts within scope from hard ones out of it better, about other subjects too."""
    first, last = train(steps=1), train(steps=150)
    assert last.report["loss"] < first.report["loss"]
    assert separation(last) > separation(first) + 0.05


def test_training_is_reproducible() -> None:
    """Two trainings with one seed give one classifier, to the bit; another seed another one."""
    assert train().classifier.digest == train().classifier.digest != train(seed=1).classifier.digest


@pytest.mark.parametrize("stop_after", [3, 30])
def test_interrupted_training_gives_the_same_classifier(
    stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that was stopped, before or after its first state, resumes and gives the same classifier."""
    monkeypatch.setattr("service.training.scope_training.STEPS_PER_STATE", 20)
    store = InMemoryStore()
    interrupted = train_scope(MODEL, some_records(), plan(), store)
    while isinstance(outcome := advance(interrupted), Progress):
        if (outcome.phase, outcome.done) == (Phase.TRAIN, stop_after):
            break
    interrupted.close()
    assert ("state" in store) is (stop_after > 20)
    resumed = train_scope(MODEL, some_records(), plan(), store)
    first = next(p for p in iter(lambda: advance(resumed), None) if getattr(p, "phase", None) == Phase.TRAIN)
    assert isinstance(first, Progress) and first.done == (21 if stop_after > 20 else 1)
    assert run_to_completion(resumed).classifier.digest == train().classifier.digest
    assert STEPS_PER_STATE > 20


def test_store_of_another_training_is_refused() -> None:
    """Results of other records or another plan are not mixed."""
    store = InMemoryStore()
    train(store)
    with pytest.raises(InvalidInput, match="another plan, model or set of records"):
        train(store, steps=61)


def test_layer_must_exist() -> None:
    """The layer is by default at a quarter of the depth, and one that does not exist is refused."""
    assert train(layer=None, steps=1).classifier.layer == 0
    with pytest.raises(InvalidInput, match="layers 0 to 2"):
        train(layer=3)


def test_thresholds_keep_the_rate_on_their_part() -> None:
    """On the part by which they were chosen at most the stated share of pairs out of scope opens."""
    trained = train(false_open_rate=0.25)
    split = split_by_subject(scope_facts(some_records()), 0)
    reader = reader_of(MODEL, 1)

    def read(texts: Any) -> torch.Tensor:
        return reader.read_batch([MODEL.encode(t)[0] for t in texts])

    measured = run_to_completion(
        measure_scope(trained.classifier, read, split.threshold, split.training.texts, 0)
    )
    classifier = trained.classifier
    outside = measured.similarities[~measured.within]
    assert (outside >= classifier.threshold).double().mean() <= 0.25 + 0.03  # features of other batches
    named = measured.similarities[~measured.within & measured.names_subject]
    assert (named >= classifier.subject_threshold).double().mean() <= 0.25 + 0.06


def test_few_texts_with_the_subject_choose_no_threshold() -> None:
    """Where subjects have one relation each, no text out of scope has the subject: the threshold for any prompt is that
    for prompts with the subject, too."""
    records = [r for r in some_records() if r.relation == RELATIONS[0]]
    classifier = run_to_completion(train_scope(MODEL, records, plan(), InMemoryStore())).classifier
    assert classifier.subject_threshold == classifier.threshold > 0


def test_figures_are_those_of_the_definitions() -> None:
    """The shares are counted pair by pair: within and out of scope, and what a memory of all facts opens."""
    trained = train()
    split = split_by_subject(scope_facts(some_records()), 0)
    reader = reader_of(MODEL, 1)
    measured: ScopeMeasurement = run_to_completion(
        measure_scope(
            trained.classifier,
            lambda texts: torch.stack([reader.read(MODEL.encode(t)[0]) for t in texts]),
            split.measured,
            (),
            0,
        )
    )
    threshold = trained.classifier.subject_threshold
    figures = measured.figures(trained.classifier)["with_subject"]
    facts = split.measured.facts
    opened: dict[str, list[bool]] = {}
    right: list[bool] = []
    wrong: list[bool] = []
    for pair, phi in zip(measured.pairs, measured.to_all.tolist(), strict=True):
        candidates = [i for i in range(len(facts)) if facts[i].subject in pair.text and phi[i] >= threshold]
        opened.setdefault(pair.kind or "within", []).append(pair.fact in candidates)
        if pair.kind is None:
            best = max(candidates, key=lambda i: phi[i], default=None)
            right.append(best == pair.fact)
            wrong.append(best not in (None, pair.fact))
    assert figures["within_open"] == pytest.approx(sum(opened["within"]) / len(opened["within"]))
    for kind in ("subject", "relation", "other"):
        assert figures["outside_open"][kind] == pytest.approx(sum(opened[kind]) / len(opened[kind]))
    assert figures["memory"]["right"] == pytest.approx(sum(right) / len(right))
    assert figures["memory"]["wrong"] == pytest.approx(sum(wrong) / len(wrong))
    assert figures["memory"]["records"] == len(facts)
