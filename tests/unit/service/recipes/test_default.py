"""The recipe of a model for which nothing is known: service.recipes.default."""

from __future__ import annotations

import pytest

from service.recipes.default import default_recipe, layers_to_try
from service.recipes.published import PUBLISHED


@pytest.mark.parametrize("layers", [1, 2, 3, 6, 12, 30, 80])
def test_candidates_are_layers_of_the_model(layers: int) -> None:
    """Whatever the depth, the candidates are at most six different layers in order, and the default is one of them."""
    candidates = layers_to_try(layers)
    assert 1 <= len(candidates) <= 6
    assert list(candidates) == sorted(set(candidates))
    assert all(0 <= x < layers for x in candidates)
    assert default_recipe("llama", layers).rome.layers[0] in candidates


def test_more_candidates_from_the_first_layer_on() -> None:
    """A search can ask for more candidates, from another depth on."""
    assert layers_to_try(30, 8, 0.0) == (0, 2, 3, 5, 7, 9, 10, 12)
    assert layers_to_try(8, 8, 0.0) == (0, 1, 2, 3)


def test_the_candidates_span_the_published_layers() -> None:
    """For the depth of every published recipe, its layer lies between the first and the last candidate."""
    for (_, layers, *_), recipe in PUBLISHED.items():
        candidates = layers_to_try(layers)
        assert candidates[0] <= recipe.rome.layers[0] <= candidates[-1]


def test_the_default_depth_is_that_of_the_architecture() -> None:
    """The default is a third of the depth in GPT-2 and a sixth in Llama, as published."""
    assert abs(default_recipe("gpt2", 48).rome.layers[0] - 17) <= 2
    assert abs(default_recipe("llama", 32).rome.layers[0] - 5) <= 2


def test_edits_of_a_chat_model_keep_their_subject() -> None:
    """The default of a model with a chat template has a restatement in the search; that of another one is as
    published."""
    assert default_recipe("llama", 32, is_chat=True).rome.restatement_weight > 0
    assert default_recipe("llama", 32).rome.restatement_weight == 0
