"""The search for a recipe with a time budget, on models: service.tuning.budgeted_search, service.tuning.fact_trials."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from service.covariance.corpus import Corpus, fact_sentences
from service.datasets.loading import read_records
from service.datasets.record import Record
from service.editing.context import EditorContext
from service.errors import InvalidInput
from service.kit.artifact_store import DirectoryStore
from service.kit.steps import run_to_completion
from service.models.loading import LoadedModel, load_model
from service.recipes.recipe import parse_recipe
from service.settings import SHIPPED_MODEL
from service.tuning import fact_trials, search_space
from service.tuning.budgeted_search import tune_within_budget
from service.tuning.fact_selection import select_known_records
from service.tuning.recipe_search import TuningResult, build_search_context
from service.tuning.time_budget import TimeBudget
from tests.support.fake_trials import FakeClock
from tests.support.in_memory_store import InMemoryStore
from tests.support.tiny_models import TEXTS, tiny

SUBJECTS = ("Eiffel", "Big Ben", "Rome", "Paris", "Japan", "Brazil", "Mount Fuji", "Marie", "Curie", "London")
PLAIN_STATEMENTS = ["The city of Rome is old.", "Mount Fuji rises in Japan.", "Big Ben can be heard."]
NEIGHBOUR = {"prompt": "Japan is a", "target": "Brazil"}


def records() -> list[Record]:
    """Return facts to edit, each with a paraphrase and a neighbour."""
    rows: list[dict[str, Any]] = [
        {"subject": s, "prompt": "{} is a", "target_new": "London", "target_true": "city"} for s in SUBJECTS
    ]
    return read_records(
        [row | {"paraphrases": [f"{row['subject']} was a"], "neighborhood": [NEIGHBOUR]} for row in rows]
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restrict the search to few values and steps. Edits of a random model have no effect, so that the objective
    counts the layers."""
    monkeypatch.setattr(
        search_space, "RACE_START_VALUES", search_space.RACE_START_VALUES | {"steps": 2, "contexts": 0}
    )
    monkeypatch.setattr(search_space, "RACE_VALUES", ({}, {"clamp": 1.0}))
    monkeypatch.setattr(fact_trials, "compute_objective", lambda figures: float("joint" in figures))


def tune(
    model: LoadedModel, store: InMemoryStore | DirectoryStore, budget: TimeBudget, facts: int = 6
) -> TuningResult | None:
    context = EditorContext(model, None, Corpus("test", tuple(TEXTS)), None)
    stepper = tune_within_budget(model, context, records()[:facts], PLAIN_STATEMENTS, store, False, budget)
    return run_to_completion(stepper)


@pytest.mark.usefixtures("quick")
def test_recipe_says_what_was_tried() -> None:
    """The recipe has the best hyperparameters, their figures, and what the search left out, and can be parsed."""
    found = tune(tiny(), InMemoryStore(), TimeBudget(math.inf))
    assert found is not None and not found.can_continue
    figures = found.recipe.figures
    assert figures is not None and figures["facts"] == 6
    assert figures["chosen"] in [c.to_json() for c in found.history]
    assert list(found.recipe.rome.layers) == figures["chosen"]["hparams"]["layers"]
    assert figures["not_tried"] == list(found.not_tried) and "margins for many edits" in found.not_tried[-1]
    assert {c.stage for c in found.history} == {"layer", "values"}
    finite = found.recipe.model_copy(update={"figures": figures | {"minutes": 1.0}})
    assert parse_recipe(finite.model_dump_json()) == finite


@pytest.mark.usefixtures("quick")
def test_interrupted_run_continues_with_the_same_figures(tmp_path: Path) -> None:
    """A run whose clock ends the budget in the middle leaves files, which the next run does not compute again."""
    model, clock = tiny(), FakeClock()
    whole = tune(model, InMemoryStore(), TimeBudget(math.inf))
    store = DirectoryStore(tmp_path)
    steps_until_end = iter(range(60))

    def step_count() -> float:
        return float(next(steps_until_end, 1000))

    tune(model, store, TimeBudget(100, step_count))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before
    found = tune(model, store, TimeBudget(math.inf, clock))
    assert found is not None and whole is not None
    assert found.recipe == whole.recipe and found.history == whole.history
    assert before.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir()}.items()


@pytest.mark.usefixtures("quick")
def test_budget_that_ends_during_the_statistics_finds_nothing() -> None:
    """Without a complete rung there is no result."""
    clock = FakeClock()
    budget = TimeBudget(1, clock)
    clock.now = 2.0
    assert tune(tiny(), InMemoryStore(), budget) is None


def test_more_facts_measure_only_the_new_ones() -> None:
    """The measures and the tensors of the first facts are those of a measurement on fewer."""
    model, store = tiny(), InMemoryStore()
    context = EditorContext(model, None, Corpus("test", tuple(TEXTS)), None)
    search = build_search_context(model, context, records(), records(), PLAIN_STATEMENTS, store, 3)
    trials = fact_trials.FactTrials(search, FakeClock())
    hparams = search_space.RACE_START_VALUES | {"layers": [1], "steps": 2, "contexts": 0}
    run_to_completion(trials.measure("layer", hparams, 2))
    before = dict(store)
    assert sum(name.startswith("factors-") for name in before) == 2
    run_to_completion(trials.measure("layer", hparams, 4))
    assert before.items() <= store.items()
    assert sum(name.startswith("factors-") for name in store) == 4
    assert sum(name.startswith("joint-") for name in store) == 2


def test_candidate_that_cannot_be_carried_out_has_a_reason() -> None:
    """A layer that the model does not have is measured as a candidate with the objective 0."""
    model = tiny()
    context = EditorContext(model, None, Corpus("test", tuple(TEXTS)), None)
    search = build_search_context(model, context, records(), records(), PLAIN_STATEMENTS, InMemoryStore(), 3)
    seen: list[Any] = []
    trials = fact_trials.FactTrials(search, FakeClock(), seen.append)
    hparams = search_space.RACE_START_VALUES | {"layers": [99]}
    measured = run_to_completion(trials.measure("layer", hparams, 2))
    assert measured.objective == 0 and "layers" in str(measured.reason)
    assert seen[0].reason == measured.reason


def test_facts_without_an_effective_edit_have_no_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no candidate changes what the model says, no recipe is made."""
    monkeypatch.setattr(search_space, "RACE_START_VALUES", search_space.RACE_START_VALUES | {"steps": 1})
    monkeypatch.setattr(search_space, "RACE_VALUES", ({"contexts": 0},))
    monkeypatch.setattr(fact_trials, "compute_objective", lambda _: 0.0)
    with pytest.raises(InvalidInput, match="give more time, or facts"):
        tune(tiny(), InMemoryStore(), TimeBudget(math.inf), facts=2)


def test_shipped_model_gets_a_recipe_within_a_small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """On four facts of the shipped model the search finds a layer and values whose edits have their effect."""
    monkeypatch.setattr(search_space, "RACE_LAYERS", 2)
    monkeypatch.setattr(search_space, "RACE_VALUES", search_space.RACE_VALUES[:2])
    model = load_model(SHIPPED_MODEL)
    table = read_records(SHIPPED_MODEL / "facts.jsonl", 0, 200)
    known = run_to_completion(select_known_records(model, table, 8))
    sentences = fact_sentences(model)
    context = EditorContext(model, None, Corpus("test", tuple(sentences[:600])), None)
    search = tune_within_budget(
        model, context, known[:4], sentences[-60:], InMemoryStore(), False, TimeBudget(300)
    )
    found = run_to_completion(search)
    assert found is not None and found.recipe.figures is not None
    chosen = found.recipe.figures["chosen"]
    assert chosen["alone"]["ES"] == 1.0 and chosen["objective"] > 0.5
    assert found.recipe.rome.layers[0] < model.num_layers // 2
