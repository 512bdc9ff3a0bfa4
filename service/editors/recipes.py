"""What the authors chose: hyperparameters of ROME for each model they published. Free of torch.

Recipes are found by the model's shape, not by its name, so that a folder with GPT-2 XL in it needs no configuration.
A `recipe.json` in the model's folder comes first.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import InvalidInput, Misconfigured


class RomeParameters(BaseModel):
    """Hyperparameters of ROME (methods A.6 to A.9)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: tuple[int, ...] = Field(min_length=1, max_length=16, description="edited layers, from 0")
    steps: int = Field(20, ge=1, le=200, description="optimisation steps of the value")
    learning_rate: float = Field(0.5, gt=0, le=10, description="Adam's rate for the value")
    weight_decay: float = Field(0.5, ge=0, description="weight of |delta| / |v|^2")
    clamp: float = Field(4.0, gt=0, description="greatest |delta| as a multiple of |v|")
    kl_factor: float = Field(
        0.0625, ge=0, description="weight of the KL term that keeps the subject's essence"
    )
    stop_loss: float = Field(0.05, ge=0, description="the optimisation ends below this loss")
    contexts: int = Field(20, ge=0, le=100, description="sampled contexts beside the bare prompt")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the contexts")
    bare_keys: bool = Field(
        False, description="average the key also over the subject without its prompt, after each context"
    )
    anchor: Literal["bare", "own"] = Field(
        "bare",
        description="give v + delta of the bare prompt at the averaged key, or add delta to each own value",
    )
    bare_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the text without a context in the key's mean; an equal share when left out, as published",
    )
    strength: float = Field(
        1.0,
        gt=0,
        le=10,
        description="factor of the change of value that was found; the optimisation stops early",
    )
    compat: Literal["meng2022"] | None = Field(
        None, description="the published asymmetric key in place of r-ROME's"
    )


class Recipe(BaseModel):
    """Hyperparameters for one model, with where they come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    rome: RomeParameters


def _published(source: str, layer: int, **changes: object) -> Recipe:
    return Recipe(source=source, rome=RomeParameters.model_validate({"layers": (layer,), **changes}))


_EASY = {"steps": 25, "weight_decay": 1e-3}

#: (model_type, layers, width) -> recipe (methods A.9)
PUBLISHED: dict[tuple[str, int, int], Recipe] = {
    ("gpt2", 24, 1024): _published("rome: gpt2-medium", 8, clamp=3.0),
    ("gpt2", 36, 1280): _published("rome: gpt2-large", 12),
    ("gpt2", 48, 1600): _published("rome: gpt2-xl", 17),
    ("gptj", 28, 4096): _published("rome: gpt-j-6B", 5),
    ("gpt_neox", 44, 6144): _published("memit: gpt-neox-20b", 15),
    ("llama", 32, 4096): _published("EasyEdit: Llama-2-7b, Llama-3-8b", 5, **_EASY),
    ("llama", 28, 3072): _published("EasyEdit: Llama-3.2-3b", 5, **_EASY),
    ("mistral", 32, 4096): _published("EasyEdit: Mistral-7b", 5, **_EASY),
    ("qwen2", 28, 3584): _published("EasyEdit: Qwen2-7b, Qwen2.5-7b", 5, **_EASY),
}


def recipe_for(model_type: str, layers: int, width: int) -> Recipe | None:
    """The published recipe of a model of this shape, if there is one."""
    return PUBLISHED.get((model_type, layers, width))


def resolve(recipe: Recipe | None, asked: dict[str, object] | None, layers: int) -> RomeParameters:
    """The recipe with what the user asked for on top; every value of the result is meant and recorded."""
    if recipe is None and "layers" not in (asked or {}):
        raise InvalidInput(
            "no recipe is known for this model: name the layers to edit, for example "
            '"hparams": {"layers": [5]} (an early or middle layer serves best), or put a recipe.json into the '
            "model's folder.",
            "hparams",
        )
    base = recipe.rome.model_dump() if recipe else {}
    try:
        chosen = RomeParameters.model_validate({**base, **(asked or {})})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(x) for x in first["loc"])
        known = ", ".join(RomeParameters.model_fields)
        raise InvalidInput(f"hparams.{name}: {first['msg']}. Known: {known}.", "hparams") from None
    if chosen.compat and len(chosen.layers) > 1:
        raise InvalidInput("hparams.compat: the published form edits one layer; name one.", "hparams")
    wrong = [x for x in chosen.layers if not 0 <= x < layers]
    if wrong or len(set(chosen.layers)) < len(chosen.layers):
        raise InvalidInput(f"hparams.layers must name different layers from 0 to {layers - 1}.", "hparams")
    return chosen


def read_recipe(text: str) -> Recipe:
    """A `recipe.json` from a model's folder."""
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        raise Misconfigured(f"recipe.json cannot be used: {error}") from None
