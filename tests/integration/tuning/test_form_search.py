"""The comparison of edits in the weights and gated edits: service.tuning.form_search."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.covariance.corpus import Corpus
from service.editing.context import EditorContext
from service.kit.steps import run_to_completion
from service.recipes.recipe import Recipe
from service.tuning.form_search import FormChoice, FormSearch
from service.tuning.objective import Candidate, evaluate_candidate
from service.tuning.recipe_search import build_search_context
from service.tuning.search_space import Stage
from tests.integration.tuning.test_recipe_search import PLAIN_STATEMENTS, records
from tests.support.in_memory_store import InMemoryStore
from tests.support.tiny_models import TEXTS, tiny

HPARAMS: dict[str, Any] = {"layers": [0, 1], "steps": 3, "contexts": 0, "learning_rate": 0.5}
TOGETHER = 6  # edits


@pytest.fixture(scope="module")
def store() -> InMemoryStore:
    """Return a store that tests share, so that a candidate is measured once."""
    return InMemoryStore()


def choose(store: InMemoryStore, weights_scores: float) -> FormChoice:
    """Compare the forms where the edits in the weights have these scores together and no rise of the loss."""
    model, facts = tiny(), records()
    context = EditorContext(model, None, Corpus("test", tuple(TEXTS)), None)
    search = build_search_context(model, context, facts[:3], facts, PLAIN_STATEMENTS, store, 3)
    alone = run_to_completion(evaluate_candidate(search, Stage.LAYER_RANGE, "rome", HPARAMS))
    scores: dict[str, float | None] = dict.fromkeys(("ES", "PS", "NS", "S"), weights_scores)
    alone = replace(alone, alone=alone.alone or scores)
    together = Candidate(Stage.MARGIN, "rome", HPARAMS, 0.0, joint=scores, loss_increase=0.0)
    seen: list[Candidate] = []
    choice = run_to_completion(
        FormSearch(search, facts[:TOGETHER], seen.append).execute(alone, together, HPARAMS | {"margin": 0.25})
    )
    assert seen == choice.candidates
    return choice


def test_every_layer_is_tried_gated(store: InMemoryStore) -> None:
    """The candidates are the edits in the weights and gated edits at each layer, all on the same number of edits."""
    choice = choose(store, 0.0)
    assert [(c.hparams.get("form", "weights"), c.hparams["layers"]) for c in choice.candidates] == [
        ("weights", [0, 1]),
        ("gated", [0]),
        ("gated", [1]),
    ]
    assert {c.edits for c in choice.candidates} == {TOGETHER}
    assert all(c.reason is None and c.joint is not None for c in choice.candidates)


def test_form_with_the_greater_objective_is_chosen(store: InMemoryStore) -> None:
    """Edits in the weights that do nothing together lose to gated edits; edits that do everything win."""
    gated = choose(store, 0.0)
    best = max(gated.candidates, key=lambda c: c.objective)
    assert gated.hparams == best.hparams and best.hparams["form"] == "gated" and best.objective > 0
    assert choose(store, 1.0).hparams == HPARAMS | {"margin": 0.25}


def test_chosen_form_is_that_of_the_recipe(store: InMemoryStore) -> None:
    """A recipe with the chosen hyperparameters writes gated edits, and its batches too."""
    recipe = Recipe.model_validate({"source": "test", "rome": choose(store, 0.0).hparams})
    assert recipe.rome.form == "gated" and recipe.batch_method == "rome"
