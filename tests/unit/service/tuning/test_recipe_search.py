"""A recipe found by editing: service.tuning.recipe_search."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from service.covariance.corpus import Corpus
from service.datasets.loading import read_records
from service.datasets.record import Record
from service.editing.context import EditorContext
from service.errors import InvalidInput
from service.kit.steps import run_to_completion
from service.methods.registry import METHODS
from service.models.loading import LoadedModel, load_model, with_bos
from service.recipes.recipe import parse_recipe, resolve_hparams
from service.settings import SHIPPED_MODEL
from service.tuning import recipe_search
from service.tuning.recipe_search import (
    TuningResult,
    candidate_layers,
    layer_ranges_around,
    prefers_bos,
    recorded_objective,
    score_with_and_without_bos,
    select_known_records,
    tune_recipe,
)
from tests.support.tiny_models import TEXTS, tiny

SUBJECTS = ("Eiffel", "Big Ben", "Rome", "Paris", "Japan", "Brazil", "Mount Fuji", "Marie", "Curie", "London")
OTHERS = ["The city of Rome is old.", "Mount Fuji rises in Japan.", "Big Ben can be heard."]


class InMemoryStore(dict[str, bytes]):
    """What is kept, and how often it was asked to keep."""

    def put(self, name: str, data: bytes) -> None:
        self[name] = data


def records() -> list[Record]:
    """Facts to edit, each with a wording and a neighbour."""
    rows = [
        {
            "subject": subject,
            "prompt": "{} is a",
            "target_new": "London",
            "target_true": "city",
            "paraphrases": [f"{subject} was a"],
            "neighborhood": [{"prompt": "Japan is a", "target": "Brazil"}],
        }
        for subject in SUBJECTS
    ]
    return read_records(rows)


def set_search_space(monkeypatch: pytest.MonkeyPatch, method: str, stage: tuple[dict[str, Any], ...]) -> None:
    """Make the search for a recipe try one stage of values for a method."""
    monkeypatch.setitem(METHODS, method, replace(METHODS[method], search_space=(stage,)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of few candidates and steps."""
    monkeypatch.setattr(
        recipe_search, "START_VALUES", recipe_search.START_VALUES | {"steps": 3, "contexts": 0}
    )
    monkeypatch.setattr(recipe_search, "STAGES", {"key": ({"bare_keys": True},)})
    set_search_space(monkeypatch, "memit", ({"ridge": 1.0},))
    set_search_space(monkeypatch, "ft", ({"steps": 2},))
    monkeypatch.setattr(recipe_search, "MIN_FACTS", 3)


def tune(model: LoadedModel, store: InMemoryStore, **changes: Any) -> TuningResult:
    context = EditorContext(model, None, Corpus("test", tuple(TEXTS)), None)
    return run_to_completion(tune_recipe(model, context, records(), OTHERS, store, False, **changes))


@pytest.mark.usefixtures("quick")
def test_the_recipe_is_the_best_of_what_was_tried() -> None:
    """The recipe holds the values of greatest merit, its own figures, and can be read back and resolved."""
    found = tune(tiny(), InMemoryStore(), methods=("memit", "ft"))
    rome = [h for h in found.history if h["method"] == "rome"]
    best = max(rome, key=lambda h: h["merit"])
    assert found.recipe.figures is not None
    assert found.recipe.figures["chosen"]["merit"] == best["merit"]
    assert list(found.recipe.rome.layers) == best["hparams"]["layers"]
    assert {h["stage"] for h in rome} == {"layer", "spread", "key"}
    again = parse_recipe(found.recipe.model_dump_json())
    assert again == found.recipe
    assert resolve_hparams(again, None, 3, "memit").model_dump()["layers"] == found.recipe.rome.layers
    assert set(found.recipe.methods) == {"memit", "ft"} == set(found.recipe.figures["methods"])


TEST_MARGIN_GRID = (0.1, 1.0, 3.0, 5.0)


def loss_increase_by_margin(found: TuningResult, records: int) -> dict[float, float]:
    """The rise of the loss by lead, of what was tried with so many edits."""
    many = [h for h in found.history if h["stage"] == "many" and h["edits"] == records]
    return {h["hparams"]["required_margins"][0][1]: h["rise"] for h in many}


@pytest.mark.usefixtures("quick")
def test_one_layer_methods_search_with_values_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """r-ROME edits one layer, the best of those tried, and takes nothing from a search that was meant for several."""
    set_search_space(monkeypatch, "r-rome", ({"steps": 2, "clamp": 3.0}, {"steps": 2, "clamp": 4.0}))
    found = tune(tiny(), InMemoryStore(), methods=("r-rome",))
    own = found.recipe.methods["r-rome"]
    tried = [h for h in found.history if h["method"] == "r-rome"]
    assert {tuple(h["hparams"]["layers"]) for h in tried} == {
        (x,) for x in candidate_layers(tiny().num_layers)
    }
    assert own in [h["hparams"] for h in tried] and own["clamp"] in (3.0, 4.0)
    assert max(h["merit"] for h in tried) == next(h["merit"] for h in tried if h["hparams"] == own)


@pytest.mark.usefixtures("quick")
def test_the_largest_margin_within_the_limit_is_chosen_for_each_number_of_edits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For all, half and a quarter of many edits, the lead is the greatest of the ladder that halving finds within the limit."""
    monkeypatch.setattr(recipe_search, "MARGIN_GRID", TEST_MARGIN_GRID)
    width, every = tiny().intermediate_size, loss_increase_of_each_margin(monkeypatch)
    limit = sorted(every.values())[len(every) // 2]  # one that some meet and some miss
    monkeypatch.setattr(recipe_search, "MAX_LOSS_INCREASE", limit)
    found = tune(tiny(), InMemoryStore(), many=records())
    assert found.recipe.rome.strengths == recipe_search.STRENGTH_GRID
    for fullness, lead in found.recipe.rome.required_margins:
        tried = loss_increase_by_margin(found, round(fullness * width))
        fitting = [x for x, rise in tried.items() if rise <= limit]
        assert lead == (max(fitting) if fitting else TEST_MARGIN_GRID[0])
        assert all(
            x > lead for x in tried.keys() - set(fitting) - {lead}
        )  # what was tried above does not fit
    assert found.recipe.figures is not None
    shown = [
        (h["edits"] / width, h["hparams"]["required_margins"][0][1]) for h in found.recipe.figures["many"]
    ]
    assert shown == list(found.recipe.rome.required_margins)
    assert found.recipe.rome.margin == min(
        recipe_search.FULL_STRENGTH_MARGIN, *(lead for _, lead in found.recipe.rome.required_margins)
    )


def loss_increase_of_each_margin(monkeypatch: pytest.MonkeyPatch) -> dict[float, float]:
    """The rise by lead of all edits at once, each lead tried."""
    rises: dict[float, float] = {}
    for lead in TEST_MARGIN_GRID:
        with monkeypatch.context() as patch:
            patch.setattr(recipe_search, "MARGIN_GRID", (lead,))
            rises |= loss_increase_by_margin(tune(tiny(), InMemoryStore(), many=records()), len(records()))
    return rises


@pytest.mark.usefixtures("quick")
def test_every_fact_is_in_a_batch_and_the_worst_batch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the many facts at once means both halves, and the rise of the loss is that of the half that costs more."""
    monkeypatch.setattr(recipe_search, "MARGIN_GRID", (0.5,))
    monkeypatch.setattr(recipe_search, "MAX_LOSS_INCREASE", -1.0)
    found = tune(tiny(), InMemoryStore(), many=records())
    many = [h for h in found.history if h["stage"] == "many"]
    sizes = [round(share * len(records())) for share in recipe_search.BATCH_FRACTIONS]
    assert [(h["edits"], len(h["rises"])) for h in many] == [(n, len(records()) // n) for n in sizes]
    assert all(h["rise"] == max(h["rises"]) for h in many) and len(set(many[1]["rises"])) == 2


@pytest.mark.usefixtures("quick")
def test_the_smallest_margin_is_taken_when_none_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that no lead meets gives the mildest; one that all meet gives the greatest, and fewer edits are not asked."""
    monkeypatch.setattr(recipe_search, "MARGIN_GRID", TEST_MARGIN_GRID)
    monkeypatch.setattr(recipe_search, "MAX_LOSS_INCREASE", -1.0)
    mildest = tune(tiny(), InMemoryStore(), many=records()).recipe.rome
    assert [lead for _, lead in mildest.required_margins] == [
        TEST_MARGIN_GRID[0]
    ] * 3 and mildest.clamp == recipe_search.MAX_CLAMP
    monkeypatch.setattr(recipe_search, "MAX_LOSS_INCREASE", 1e9)
    strongest = tune(tiny(), InMemoryStore(), many=records()).recipe.rome
    assert [lead for _, lead in strongest.required_margins] == [
        TEST_MARGIN_GRID[-1]
    ] and strongest.margin == recipe_search.FULL_STRENGTH_MARGIN


@pytest.mark.usefixtures("quick")
def test_an_interrupted_search_resumes() -> None:
    """What was tried before is not tried again, and the recipe is the same."""
    model, store = tiny(), InMemoryStore()
    uninterrupted = tune(model, InMemoryStore())
    known = records()
    context = EditorContext(model, None, Corpus("test", tuple(TEXTS)), None)
    stepper = tune_recipe(model, context, known, OTHERS, store, False)
    while len(store) < 3:
        next(stepper)
    stepper.close()
    stages: list[str] = []
    before = dict(store)
    found = run_to_completion(
        tune_recipe(model, context, known, OTHERS, store, False, on_candidate=lambda s, _: stages.append(s))
    )
    assert found == uninterrupted
    assert len(stages) == len(uninterrupted.history) and before.items() <= store.items()


def test_an_untried_candidate_has_objective_zero() -> None:
    """What cannot be carried out has the merit 0 and says why."""
    history = [{"hparams": {"layers": [1]}, "merit": 0.4}]
    assert (recorded_objective(history, {"layers": [1]}), recorded_objective(history, {"layers": [2]})) == (
        0.4,
        0.0,
    )


def test_unknown_facts_are_left_out() -> None:
    """Only facts whose object is the model's own answer are edited, one of each subject."""
    model = load_model(SHIPPED_MODEL)
    table = read_records(SHIPPED_MODEL / "facts.jsonl", 0, 10)
    wrong = [replace(r, target_true=r.target_new) for r in table]
    known = run_to_completion(select_known_records(model, [*wrong, *table, *table], 100))
    assert all(r in table for r in known)
    assert len(known) == len({r.subject for r in known}) > 7
    with pytest.raises(InvalidInput, match="and a recipe needs 8"):
        run_to_completion(select_known_records(model, table[:5], 100))


def test_candidate_layers_and_ranges() -> None:
    """Single layers reach three quarters deep, at most twelve of them; spreads hold the layer and stay in the model."""
    assert candidate_layers(8) == [0, 1, 2, 3, 4, 5]
    assert len(candidate_layers(48)) == 12 and max(candidate_layers(48)) < 36
    assert candidate_layers(1) == [0]
    assert layer_ranges_around(0, 8) == [(0, 1), (0, 1, 2)]
    assert all(4 in run for run in layer_ranges_around(4, 8))
    assert layer_ranges_around(7, 8) == [(6, 7), (5, 6, 7)]


def test_bos_is_preferred_where_it_scores_better() -> None:
    """The model that reads facts better after its start token gets it, unless its tokenizer puts it there already."""
    model = tiny()
    started = with_bos(model)
    assert started.encode("Rome")[0] == [model.tokenizer.bos_token_id, *model.encode("Rome")[0]]
    assert started.encode("Rome")[1][1:] == model.encode("Rome")[1]
    assert started.fingerprint != model.fingerprint and started.loaded_fingerprint == model.fingerprint
    assert with_bos(started) is started
    log_probs = run_to_completion(score_with_and_without_bos(model, records()))
    better = log_probs["after the start token"] > log_probs["as it is"]
    assert prefers_bos(model, log_probs) is better
    assert not prefers_bos(started, {"as it is": -2.0, "after the start token": -1.0})


@pytest.mark.usefixtures("quick")
def test_figures_do_not_depend_on_chance() -> None:
    """Two preparations of one model find the same recipe."""
    random.seed(1)
    one = tune(tiny(), InMemoryStore())
    random.seed(2)
    assert tune(tiny(), InMemoryStore()) == one
