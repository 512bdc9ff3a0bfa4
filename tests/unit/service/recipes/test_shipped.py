"""Tests of service.recipes.shipped: recipes of public models that are part of the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import Misconfigured
from service.recipes.shipped import FOLDER, ModelShape, shipped_recipe, shipped_recipes

SHAPE = ModelShape(
    model_type="llama", layers=30, width=576, inner_width=1536, vocabulary=49152, positions=8192
)


def write(folder: Path, name: str, **changes: Any) -> None:
    value = {"shape": SHAPE.model_dump(), "recipe": {"source": name, "rome": {"layers": [1]}}} | changes
    (folder / f"{name}.json").write_text(json.dumps(value))


def test_every_shipped_recipe_fits_its_shape() -> None:
    """Each shipped file is valid, edits layers that the model has, and says where it comes from."""
    recipes = shipped_recipes()
    assert len(recipes) == len(list(FOLDER.iterdir())) >= 1
    for item in recipes:
        assert all(0 <= layer < item.shape.layers for layer in item.recipe.rome.layers) and item.recipe.source


def test_smollm2_has_a_recipe_under_any_name() -> None:
    """SmolLM2 is found by its shape, whatever its folder is called; a model of another shape is not."""
    assert shipped_recipe(SHAPE, "my-folder") == shipped_recipe(SHAPE, "SmolLM2-135M-Instruct.Q4_1")
    assert shipped_recipe(SHAPE, "model") is not None
    assert shipped_recipe(SHAPE.model_copy(update={"positions": 2048}), "smollm2-135m") is None


def test_names_decide_between_recipes_of_one_shape(tmp_path: Path) -> None:
    """Of two recipes for one shape the one with a fitting name is taken; without such a name, none."""
    write(tmp_path, "first", names=["base"])
    write(tmp_path, "second", names=["chat"])
    chosen = shipped_recipe(SHAPE, "Some-Chat-Model", tmp_path)
    assert chosen is not None and chosen.source == "second"
    assert shipped_recipe(SHAPE, "another", tmp_path) is None


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    """A file that is not a recipe is refused by its name."""
    write(tmp_path, "wrong", recipe={"source": "x", "rome": {"layers": [-1]}, "more": 1})
    with pytest.raises(Misconfigured, match=r"the shipped recipe wrong\.json cannot be used"):
        shipped_recipe(SHAPE, "x", tmp_path)
