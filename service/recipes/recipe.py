"""Recipes: the hyperparameters of one model, and how a request's hyperparameters are resolved. Torch-free.

A recipe comes from `palimpsest tune`, from a `recipe.json` in the model's folder, from `published.py`, from the first
edit of the model, or from `default.py`, in this order.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import InvalidInput, Misconfigured
from service.methods.method import EditMethod
from service.methods.parameters import (
    EditForm,
    GraceParameters,
    Parameters,
    RomeParameters,
    SeracParameters,
)
from service.methods.registry import DEFAULT_METHOD, METHODS, get_method

#: what the closed-form methods take from the recipe's values for "rome"
SHARED_HPARAMS = (
    "layers",
    "steps",
    "learning_rate",
    "weight_decay",
    "kl_factor",
    "stop_loss",
    "stop_margin",
    "final_rate",
    "restatement_weight",
    "subject_weight",
    "subject_token",
    "seed",
    "strengths",
    "margin",
    "required_margins",
)


class Recipe(BaseModel):
    """Hyperparameters for one model, and their source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    rome: RomeParameters
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="hyperparameters of the other methods that differ from their defaults",
    )
    batch_method: str = Field(
        DEFAULT_METHOD, description="the method of several edits in one request that name none"
    )
    candidate_layers: tuple[int, ...] = Field(
        (), description="layers that the first edit tries, where no search has chosen one yet"
    )
    prepend_bos: bool = Field(False, description="every text is read after the model's start token")
    figures: dict[str, Any] | None = Field(
        None, description="the measurements by which the recipe was chosen"
    )

    @model_validator(mode="after")
    def _known_methods(self) -> Recipe:
        for name, values in self.methods.items():
            if name not in METHODS or name == DEFAULT_METHOD:
                raise ValueError(f"methods: there is no other method {name!r}; known: {', '.join(METHODS)}")
            METHODS[name].parameters.model_validate(self.hparams_for(METHODS[name]) | values)
        if self.batch_method not in METHODS:
            raise ValueError(
                f"batch_method: there is no method {self.batch_method!r}; known: {', '.join(METHODS)}"
            )
        return self

    def with_form(self, form: EditForm | None) -> Recipe:
        """Return the recipe whose edits have a form by default; None keeps its own. Raise Misconfigured if its edits
        cannot be gated. Several edits of one request become gated, too."""
        if form is None or form == self.rome.form:
            return self
        rome = self.rome.model_copy(update={"form": form})
        if form == "weights":
            return self.model_copy(update={"rome": rome})
        try:
            _check_can_be_gated(rome, DEFAULT_METHOD)
        except InvalidInput as error:
            raise Misconfigured(f"--form gated cannot be used with this recipe: {error.detail}") from None
        return self.model_copy(update={"rome": rome, "batch_method": DEFAULT_METHOD})

    def hparams_for(self, method: EditMethod) -> dict[str, Any]:
        """Return the hyperparameters of a method before a request changes any: the recipe's values for the method, on
        top of the values that it shares with "rome"."""
        rome = self.rome.model_dump()
        shared: tuple[str, ...] = ("layers",)
        if method.searches_value:
            shared = tuple(rome) if method.parameters is RomeParameters else SHARED_HPARAMS
        base = {name: rome[name] for name in shared}
        if "form" in base and method.name != DEFAULT_METHOD:
            base["form"] = "weights"
        return base | method.fixed_hparams | self.methods.get(method.name, {})


def resolve_hparams(
    recipe: Recipe | None, overrides: dict[str, object] | None, layers: int, method: str = DEFAULT_METHOD
) -> Parameters:
    """Return the hyperparameters of an edit: the recipe, changed by the request's `hparams`. All values of the result
    are recorded.

    `layers` is the number of layers of the model. Raise InvalidInput for an unknown name, a value out of range, or
    missing layers.
    """
    edit_method = get_method(method)
    base = recipe.hparams_for(edit_method) if recipe is not None else edit_method.fixed_hparams
    if edit_method.default_depth is not None and (
        recipe is None or "layers" not in recipe.methods.get(method, {})
    ):
        base = base | {"layers": (int(edit_method.default_depth * layers),)}
    if edit_method.covers_all_layers and (recipe is None or "layers" not in recipe.methods.get(method, {})):
        base = base | {"layers": tuple(range(layers))}
    if "layers" not in base | (overrides or {}):
        raise InvalidInput(
            "no recipe is known for this model: name the layers to edit, for example "
            '"hparams": {"layers": [5]} (an early or middle layer works best), let `palimpsest tune` find a recipe, or '
            "put a recipe.json into the model's folder.",
            "hparams",
        )
    try:
        resolved = edit_method.parameters.model_validate({**base, **(overrides or {})})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(x) for x in first["loc"])
        known = ", ".join(edit_method.parameters.model_fields)
        raise InvalidInput(f"hparams.{name}: {first['msg']}. Known: {known}.", "hparams") from None
    if isinstance(resolved, RomeParameters) and resolved.compat and len(resolved.layers) > 1:
        raise InvalidInput("hparams.compat: the published form edits one layer; name one.", "hparams")
    if isinstance(resolved, RomeParameters) and resolved.compat and method != DEFAULT_METHOD:
        raise InvalidInput('hparams.compat: only the method "rome" has the published form.', "hparams")
    if isinstance(resolved, GraceParameters) and len(resolved.layers) > 1:
        raise InvalidInput(
            "hparams.layers: a codebook replaces the output of one layer; name one.", "hparams"
        )
    if isinstance(resolved, SeracParameters) and len(resolved.layers) > 1:
        raise InvalidInput("hparams.layers: the classifier reads one layer; name one.", "hparams")
    if isinstance(resolved, RomeParameters) and resolved.form == "gated":
        _check_can_be_gated(resolved, method)
    invalid_layers = [x for x in resolved.layers if not 0 <= x < layers]
    if invalid_layers or len(set(resolved.layers)) < len(resolved.layers):
        raise InvalidInput(f"hparams.layers must name different layers from 0 to {layers - 1}.", "hparams")
    return resolved


def parse_recipe(text: str) -> Recipe:
    """Parse a `recipe.json`. Raise Misconfigured when it is not valid."""
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        raise Misconfigured(f"recipe.json cannot be used: {error}") from None


def _check_can_be_gated(parameters: RomeParameters, method: str) -> None:
    """Raise InvalidInput unless an edit with these hyperparameters can be looked up."""
    if method != DEFAULT_METHOD:
        raise InvalidInput('hparams.form: only the method "rome" has the form "gated".', "hparams")
    if len(parameters.layers) > 1:
        raise InvalidInput("hparams.form: a gated edit is written at one layer; name one.", "hparams")
    if parameters.compat:
        raise InvalidInput(
            "hparams.form: the published form has no gate; leave out compat or form.", "hparams"
        )
