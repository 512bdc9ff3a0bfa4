"""The search for a recipe: service.tuning."""

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
from service.methods.parameters import RomeParameters
from service.methods.registry import METHODS
from service.models.loading import LoadedModel, load_model, with_bos
from service.recipes.recipe import parse_recipe, resolve_hparams
from service.settings import SHIPPED_MODEL
from service.tuning import search_space
from service.tuning.fact_selection import (
    BosLogProbs,
    prefers_bos,
    score_with_and_without_bos,
    select_known_records,
)
from service.tuning.objective import Candidate
from service.tuning.recipe_search import TuningResult, recorded_objective, tune_recipe
from service.tuning.search_space import Stage, candidate_layers, layer_ranges_around
from tests.support.in_memory_store import InMemoryStore
from tests.support.tiny_models import TEXTS, tiny

SUBJECTS = ("Eiffel", "Big Ben", "Rome", "Paris", "Japan", "Brazil", "Mount Fuji", "Marie", "Curie", "London")
PLAIN_STATEMENTS = ["The city of Rome is old.", "Mount Fuji rises in Japan.", "Big Ben can be heard."]


def records() -> list[Record]:
    """Return facts to edit, each with a paraphrase and a neighbour."""
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
    """Restrict the search for a method to one stage."""
    monkeypatch.setitem(METHODS, method, replace(METHODS[method], search_space=(stage,)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restrict the search to few candidates and steps."""
    monkeypatch.setattr(search_space, "START_VALUES", search_space.START_VALUES | {"steps": 3, "contexts": 0})
    monkeypatch.setattr(search_space, "STAGES", {Stage.KEY: ({"bare_keys": True},)})
    set_search_space(monkeypatch, "memit", ({"ridge": 1.0},))
    set_search_space(monkeypatch, "ft", ({"steps": 2},))
    monkeypatch.setattr(search_space, "MIN_FACTS", 3)


@pytest.fixture(scope="module")
def measured() -> InMemoryStore:
    """Return a store that tests share, so that a candidate is measured once."""
    return InMemoryStore()


def tune(model: LoadedModel, store: InMemoryStore, **changes: Any) -> TuningResult:
    context = EditorContext(model, None, Corpus("test", tuple(TEXTS)), None)
    return run_to_completion(
        tune_recipe(model, context, records(), PLAIN_STATEMENTS, store, False, **changes)
    )


@pytest.mark.usefixtures("quick")
def test_recipe_is_the_best_candidate(measured: InMemoryStore) -> None:
    """The recipe has the hyperparameters and figures of the best candidate, and can be parsed and resolved."""
    found = tune(tiny(), measured, methods=("memit", "ft"))
    rome = [c for c in found.history if c.method == "rome"]
    best = max(rome, key=lambda c: c.objective)
    assert found.recipe.figures is not None
    assert found.recipe.figures["chosen"]["objective"] == best.objective
    assert list(found.recipe.rome.layers) == best.hparams["layers"]
    assert {c.stage for c in rome} == {Stage.LAYER, Stage.LAYER_RANGE, Stage.KEY}
    again = parse_recipe(found.recipe.model_dump_json())
    assert again == found.recipe
    assert resolve_hparams(again, None, 3, "memit").model_dump()["layers"] == found.recipe.rome.layers
    assert set(found.recipe.methods) == {"memit", "ft"} == set(found.recipe.figures["methods"])


TEST_MARGIN_GRID = (0.1, 1.0, 3.0, 5.0)


def margin_of(hparams: dict[str, Any]) -> float:
    return float(hparams["required_margins"][0][1])


def loss_increase_by_margin(found: TuningResult, edits: int) -> dict[float, float]:
    """Return the loss increase of each required margin that was tried with batches of some edits."""
    return {
        margin_of(c.hparams): c.loss_increase or 0.0
        for c in found.history
        if c.stage == Stage.MARGIN and c.edits == edits
    }


@pytest.mark.usefixtures("quick")
def test_one_layer_methods_search_with_values_of_their_own(
    monkeypatch: pytest.MonkeyPatch, measured: InMemoryStore
) -> None:
    """r-ROME edits the best single layer, with its own hyperparameters instead of those found for several layers."""
    set_search_space(monkeypatch, "r-rome", ({"steps": 2, "clamp": 3.0}, {"steps": 2, "clamp": 4.0}))
    found = tune(tiny(), measured, methods=("r-rome",))
    own = found.recipe.methods["r-rome"]
    tried = [c for c in found.history if c.method == "r-rome"]
    assert {tuple(c.hparams["layers"]) for c in tried} == {(x,) for x in candidate_layers(tiny().num_layers)}
    assert own in [c.hparams for c in tried] and own["clamp"] in (3.0, 4.0)
    assert max(c.objective for c in tried) == next(c.objective for c in tried if c.hparams == own)


@pytest.mark.usefixtures("quick")
def test_greatest_margin_within_the_limit_is_chosen_for_each_number_of_edits(
    monkeypatch: pytest.MonkeyPatch, measured: InMemoryStore
) -> None:
    """Bisection finds the greatest margin whose loss increase is within the limit, for each fraction of the records."""
    monkeypatch.setattr(search_space, "MARGIN_GRID", TEST_MARGIN_GRID)
    width, increases = tiny().intermediate_size, loss_increase_of_each_margin(monkeypatch, measured)
    limit = sorted(increases.values())[len(increases) // 2]  # some margins are within it and some are not
    monkeypatch.setattr(search_space, "MAX_LOSS_INCREASE", limit)
    found = tune(tiny(), measured, batch_records=records())
    in_weights = weights_values(found)
    assert in_weights.strengths == search_space.STRENGTH_GRID
    for fullness, margin in in_weights.required_margins:
        tried = loss_increase_by_margin(found, round(fullness * width))
        within = [x for x, increase in tried.items() if increase <= limit]
        assert margin == (max(within) if within else TEST_MARGIN_GRID[0])
        assert all(x > margin for x in tried.keys() - set(within) - {margin})
    assert found.recipe.figures is not None
    margins = [(c["edits"] / width, margin_of(c["hparams"])) for c in found.recipe.figures["margins"]]
    assert margins == list(in_weights.required_margins)
    assert in_weights.margin == min(
        search_space.FULL_STRENGTH_MARGIN, *(margin for _, margin in in_weights.required_margins)
    )


def weights_values(found: TuningResult) -> RomeParameters:
    """Return the hyperparameters that were found for many edits in the weights."""
    assert found.recipe.figures is not None
    return RomeParameters.model_validate(found.recipe.figures["forms"][0]["hparams"])


def loss_increase_of_each_margin(
    monkeypatch: pytest.MonkeyPatch, measured: InMemoryStore
) -> dict[float, float]:
    """Return the loss increase of all edits at once for every margin of the grid."""
    increases: dict[float, float] = {}
    for margin in TEST_MARGIN_GRID:
        with monkeypatch.context() as patch:
            patch.setattr(search_space, "MARGIN_GRID", (margin,))
            increases |= loss_increase_by_margin(
                tune(tiny(), measured, batch_records=records()), len(records())
            )
    return increases


@pytest.mark.usefixtures("quick")
def test_margins_are_measured_on_all_batches(
    monkeypatch: pytest.MonkeyPatch, measured: InMemoryStore
) -> None:
    """Every record is in one batch, and the loss increase is that of the worst batch."""
    monkeypatch.setattr(search_space, "MARGIN_GRID", (0.5,))
    monkeypatch.setattr(search_space, "MAX_LOSS_INCREASE", -1.0)
    found = tune(tiny(), measured, batch_records=records())
    tried = [c for c in found.history if c.stage == Stage.MARGIN]
    increases = [c.loss_increases or [] for c in tried]
    sizes = [round(share * len(records())) for share in search_space.BATCH_FRACTIONS]
    assert [c.edits for c in tried] == sizes
    assert [len(x) for x in increases] == [len(records()) // n for n in sizes]
    assert [c.loss_increase for c in tried] == [max(x) for x in increases]
    assert len(set(increases[1])) == 2


@pytest.mark.usefixtures("quick")
def test_margin_is_clamped_to_the_grid(monkeypatch: pytest.MonkeyPatch, measured: InMemoryStore) -> None:
    """The smallest margin is chosen if none is within the limit.

    If all are, the greatest is, and fewer edits are not tried.
    """
    monkeypatch.setattr(search_space, "MARGIN_GRID", TEST_MARGIN_GRID)
    monkeypatch.setattr(search_space, "MAX_LOSS_INCREASE", -1.0)
    mildest = weights_values(tune(tiny(), measured, batch_records=records()))
    assert [margin for _, margin in mildest.required_margins] == [TEST_MARGIN_GRID[0]] * 3
    assert mildest.clamp == search_space.MAX_CLAMP
    monkeypatch.setattr(search_space, "MAX_LOSS_INCREASE", 1e9)
    strongest = weights_values(tune(tiny(), measured, batch_records=records()))
    assert [margin for _, margin in strongest.required_margins] == [TEST_MARGIN_GRID[-1]]
    assert strongest.margin == search_space.FULL_STRENGTH_MARGIN


@pytest.mark.usefixtures("quick")
def test_interrupted_search_resumes() -> None:
    """Stored candidates are not measured again, and the recipe is that of an uninterrupted search."""
    model, store = tiny(), InMemoryStore()
    uninterrupted = tune(model, InMemoryStore())
    known = records()
    context = EditorContext(model, None, Corpus("test", tuple(TEXTS)), None)
    stepper = tune_recipe(model, context, known, PLAIN_STATEMENTS, store, False)
    while len(store) < 3:
        next(stepper)
    stepper.close()
    candidates: list[Candidate] = []
    before = dict(store)
    found = run_to_completion(
        tune_recipe(model, context, known, PLAIN_STATEMENTS, store, False, on_candidate=candidates.append)
    )
    assert found == uninterrupted
    assert candidates == uninterrupted.history and before.items() <= store.items()


def test_untried_hyperparameters_have_objective_zero() -> None:
    """Hyperparameters that are not in the history have the objective 0."""
    history = [Candidate("layer", "rome", {"layers": [1]}, 0.4)]
    assert (recorded_objective(history, {"layers": [1]}), recorded_objective(history, {"layers": [2]})) == (
        0.4,
        0.0,
    )


def test_unknown_facts_are_left_out() -> None:
    """Only facts whose object is the model's greedy answer are selected, one of each subject."""
    model = load_model(SHIPPED_MODEL)
    table = read_records(SHIPPED_MODEL / "facts.jsonl", 0, 10)
    wrong = [replace(r, target_true=r.target_new) for r in table]
    known = run_to_completion(select_known_records(model, [*wrong, *table, *table], 100))
    assert all(r in table for r in known)
    assert len(known) == len({r.subject for r in known}) > 7
    with pytest.raises(InvalidInput, match="a recipe needs at least 8"):
        run_to_completion(select_known_records(model, table[:5], 100))


def test_candidate_layers_and_ranges() -> None:
    """At most twelve single layers reach three quarters of the depth.

    Ranges include the layer and stay in the model.
    """
    assert candidate_layers(8) == [0, 1, 2, 3, 4, 5]
    assert len(candidate_layers(48)) == 12 and max(candidate_layers(48)) < 36
    assert candidate_layers(1) == [0]
    assert layer_ranges_around(0, 8) == [(0, 1), (0, 1, 2)]
    assert all(4 in run for run in layer_ranges_around(4, 8))
    assert layer_ranges_around(7, 8) == [(6, 7), (5, 6, 7)]


def test_bos_is_preferred_where_it_scores_better() -> None:
    """BOS is preferred where it raises the log-probability, unless the tokenizer already adds it."""
    model = tiny()
    bos_model = with_bos(model)
    assert bos_model.encode("Rome")[0] == [model.tokenizer.bos_token_id, *model.encode("Rome")[0]]
    assert bos_model.encode("Rome")[1][1:] == model.encode("Rome")[1]
    assert bos_model.fingerprint != model.fingerprint and bos_model.loaded_fingerprint == model.fingerprint
    assert with_bos(bos_model) is bos_model
    log_probs = run_to_completion(score_with_and_without_bos(model, records()))
    better = log_probs.with_bos > log_probs.without_bos
    assert prefers_bos(model, log_probs) is better
    assert not prefers_bos(bos_model, BosLogProbs(without_bos=-2.0, with_bos=-1.0))


@pytest.mark.usefixtures("quick")
def test_search_is_deterministic() -> None:
    """Two searches on one model find the same recipe, whatever the state of the global random generator."""
    random.seed(1)
    one = tune(tiny(), InMemoryStore())
    random.seed(2)
    assert tune(tiny(), InMemoryStore()) == one


@pytest.mark.usefixtures("quick")
def test_grace_is_tuned(measured: InMemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search tries the layers of the upper half and the radii of the registry, and the recipe has the best ones."""
    set_search_space(monkeypatch, "grace", ({"radius": 0.05}, {"radius": 0.3}))
    found = tune(tiny(), measured, methods=("grace",))
    tried = [c.hparams for c in found.history if c.method == "grace"]
    assert [h["layers"] for h in tried[:2]] == [[1], [2]]
    assert {h.get("radius") for h in tried} == {None, 0.05, 0.3}
    best = max((c for c in found.history if c.method == "grace"), key=lambda c: c.objective)
    assert found.recipe.methods["grace"] == best.hparams
    assert resolve_hparams(found.recipe, None, 3, "grace").layers == tuple(best.hparams["layers"])
