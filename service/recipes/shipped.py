"""Shipped recipes: what `palimpsest tune` found for public models, as JSON files of the package. Torch-free.

They are found by the shape of a model, because its fingerprint differs between a folder, a GGUF file and precisions.
Where models of one shape differ, `names` tells them apart.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import Misconfigured
from service.recipes.recipe import Recipe

FOLDER = Path(__file__).parent / "data"


class ModelShape(BaseModel):
    """What a recipe depends on and a fingerprint hides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str
    layers: int
    width: int
    inner_width: int
    vocabulary: int
    positions: int


class ShippedRecipe(BaseModel):
    """One file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: ModelShape
    names: tuple[str, ...] = Field(
        (), description="parts of names of the model, in lower case; they decide between recipes of one shape"
    )
    recipe: Recipe

    def is_named(self, model: str) -> bool:
        return any(name in model.lower() for name in self.names)


@cache
def shipped_recipes(folder: Path = FOLDER) -> tuple[ShippedRecipe, ...]:
    """Return the recipes of a folder in the order of its file names. Raise Misconfigured for a file that is not
    valid."""
    recipes = []
    for path in sorted(folder.glob("*.json")):
        try:
            recipes.append(ShippedRecipe.model_validate_json(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            raise Misconfigured(f"the shipped recipe {path.name} cannot be used: {error}") from None
    return tuple(recipes)


def shipped_recipe(shape: ModelShape, name: str, folder: Path = FOLDER) -> Recipe | None:
    """Return the shipped recipe of a model: of its shape, and among several the one that its name selects; None where
    there is none."""
    fitting = [item for item in shipped_recipes(folder) if item.shape == shape]
    named = [item for item in fitting if item.is_named(name)]
    chosen = named or (fitting if len(fitting) == 1 else [])
    return chosen[0].recipe if chosen else None
