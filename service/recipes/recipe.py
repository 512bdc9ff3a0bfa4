"""The methods that edit, their hyperparameters, and what the authors chose for each model they published. Free of torch.

Recipes are found by the model's shape, not by its name, so that a folder with GPT-2 XL in it needs no configuration.
What `palimpsest prepare` wrote comes first, then a `recipe.json` in the model's folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import InvalidInput, Misconfigured

# what every method's parameters say of how strong an edit lands (docs/decisions/0010-strength-schedule.md)
Strengths = Annotated[
    tuple[Annotated[float, Field(gt=0, le=10)], ...],
    Field(
        min_length=1,
        max_length=16,
        description="factors of the change, tried in turn beside the other active edits until the edit takes",
    ),
]
Margin = Annotated[
    float,
    Field(
        ge=0,
        le=20,
        description="by how much the new object must lead for the edit to have taken, in nats of mean log-probability",
    ),
]


def _check_increasing(pairs: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    if any(x1 <= x0 for (x0, _), (x1, _) in pairwise(pairs)):
        raise ValueError("the first numbers of the pairs must rise")
    return pairs


RequiredMargins = Annotated[
    tuple[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0, le=20)]], ...],
    AfterValidator(_check_increasing),
    Field(
        max_length=16,
        description="pairs of active edits for each direction of a key, rising, and the lead in nats at which an edit is strong enough "
        "then; in between along a line. Below the first pair there is room for full strength; without pairs the margin is lead enough",
    ),
]


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
    ridge: float = Field(
        1e-3,
        gt=0,
        le=100,
        description="what tempers the isolation of subjects whose keys nearly coincide, in mean keys",
    )
    strengths: Strengths = (1.0, 1.25, 1.5, 2.0)
    margin: Margin = 0.0
    required_margins: RequiredMargins = ()


class MemitParameters(RomeParameters):
    """Hyperparameters of MEMIT (methods C.1): a change of the hidden state, spread over the layers."""

    clamp: float = Field(0.75, gt=0, description="greatest |delta| as a multiple of the hidden state's norm")
    contexts: int = Field(5, ge=0, le=100, description="sampled contexts beside the bare prompt")
    bare_weight: float | None = Field(
        0.5, ge=0, le=1, description="share of the text without a context in the key's mean"
    )
    ridge: float = Field(
        15_000.0, gt=0, description="lambda: how many average keys the statistics count for against one edit"
    )


class EmmetParameters(MemitParameters):
    """Hyperparameters of EMMET (methods C.2): MEMIT with equality constraints."""

    ridge: float = Field(0.1, gt=0, description="what keeps the solve sound where keys nearly coincide")


class AlphaEditParameters(MemitParameters):
    """Hyperparameters of AlphaEdit (methods C.3): changes that the statistics' keys hardly see."""

    ridge: float = Field(10.0, gt=0, description="L2: weight of the change's norm")
    threshold: float = Field(
        0.02, gt=0, description="directions in which the statistics' second moment is smaller may change"
    )


class FineTuneParameters(BaseModel):
    """Hyperparameters of fine-tuning one weight on the statement (methods D.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: tuple[int, ...] = Field(min_length=1, max_length=16, description="trained layers, from 0")
    steps: int = Field(25, ge=1, le=1000, description="most steps of training")
    learning_rate: float = Field(5e-4, gt=0, le=10, description="Adam's rate")
    weight_decay: float = Field(0.0, ge=0, description="Adam's weight decay")
    epsilon: float | None = Field(
        None, gt=0, description="most that an entry may move; without limit when left out"
    )
    stop_loss: float = Field(1e-2, ge=0, description="training ends below this loss")
    strengths: Strengths = (1.0, 1.25, 1.5, 2.0)
    margin: Margin = 0.0
    required_margins: RequiredMargins = ()


class ConstrainedFineTuneParameters(FineTuneParameters):
    """FT-L: no entry moves further than epsilon."""

    epsilon: float | None = Field(5e-4, gt=0, description="most that an entry may move")


class AttentionFineTuneParameters(FineTuneParameters):
    """The late-site edit: what the attention reads with is trained."""

    learning_rate: float = Field(1e-3, gt=0, le=10, description="Adam's rate")
    epsilon: float | None = Field(1e-3, gt=0, description="most that an entry may move")


Parameters = RomeParameters | FineTuneParameters


@dataclass(frozen=True)
class StrengthSchedule:
    """The strengths that an edit is tried with in turn, and the lead that is enough."""

    strengths: tuple[float, ...]
    partial_strength_margin: float  #: short of full strength
    full_strength_margin: float  #: from full strength on

    def required_margin(self, strength: float) -> float:
        """The lead, in nats of mean log-probability, at which an edit of this strength is raised no further."""
        return self.full_strength_margin if strength >= 1 else self.partial_strength_margin


def strength_schedule(
    parameters: Parameters, strengths: Sequence[float], active_edits: int, key_width: int
) -> StrengthSchedule:
    """How an edit climbs when so many will be active, in keys of so many directions (D).

    Below the first of the recipe's pairs there is room: full strength and beyond. Several pairs say that room is short; past the
    last of them nobody is raised beyond full strength, which would take more from the others than it gains.
    """
    pairs, margin, fullness = parameters.required_margins, parameters.margin, active_edits / key_width
    if not pairs:
        return StrengthSchedule(tuple(strengths), margin, margin)
    required = max(_interpolate(pairs, fullness), margin)
    at_least_full, at_most_full = tuple(s for s in strengths if s >= 1), tuple(s for s in strengths if s <= 1)
    if at_least_full and fullness < pairs[0][0]:
        return StrengthSchedule(at_least_full, margin, margin)
    if at_most_full and len(pairs) > 1 and fullness > pairs[-1][0]:
        return StrengthSchedule(at_most_full, required, margin)
    return StrengthSchedule(tuple(strengths), required, margin)


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """The line through some points, flat beyond its ends."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0)
    return points[-1][1]


@dataclass(frozen=True)
class EditMethod:
    """A way to edit."""

    name: str
    title: str
    paper: str
    parameters: type[RomeParameters] | type[FineTuneParameters]
    fixed_hparams: dict[str, Any] = field(
        default_factory=dict
    )  #: what the method says whatever a recipe for "rome" says
    default_depth: float | None = None  #: where it edits when no recipe says so, as a share of the layers

    @property
    def needs_covariance(self) -> bool:
        """Whether it writes associations, for which statistics of keys are needed."""
        return issubclass(self.parameters, RomeParameters)


_SHARED_HPARAMS = (
    "layers",
    "steps",
    "learning_rate",
    "weight_decay",
    "kl_factor",
    "stop_loss",
    "seed",
    "strengths",
    "margin",
    "required_margins",
)
_PUBLISHED_KEY_HPARAMS = {
    "anchor": "bare",
    "bare_keys": False,
    "bare_weight": None,
    "strength": 1.0,
    "compat": None,
    "ridge": 1e-3,
}

METHODS = {
    m.name: m
    for m in (
        EditMethod(
            "rome", "ROME with one key, solved jointly", "Meng et al. 2022; Gupta et al. 2024", RomeParameters
        ),
        EditMethod(
            "r-rome", "r-ROME as published", "Gupta et al. 2024", RomeParameters, _PUBLISHED_KEY_HPARAMS
        ),
        EditMethod("memit", "MEMIT", "Meng et al. 2023", MemitParameters),
        EditMethod("emmet", "EMMET", "Gupta et al. 2024", EmmetParameters),
        EditMethod("alphaedit", "AlphaEdit", "Fang et al. 2025", AlphaEditParameters),
        EditMethod("ft", "fine-tuning of an MLP", "Meng et al. 2022", FineTuneParameters),
        EditMethod(
            "ft-l", "fine-tuning of an MLP, constrained", "Zhu et al. 2020", ConstrainedFineTuneParameters
        ),
        EditMethod(
            "ft-attn",
            "fine-tuning of an attention",
            "Meng et al. 2022",
            AttentionFineTuneParameters,
            default_depth=0.69,
        ),
    )
}


class Recipe(BaseModel):
    """Hyperparameters for one model, with where they come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    rome: RomeParameters
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="what the other methods take that differs from their defaults"
    )
    batch_method: str = Field("rome", description="the method of several edits in one request that name none")
    prepend_bos: bool = Field(False, description="every text is read after the model's start token")
    figures: dict[str, Any] | None = Field(None, description="what the recipe was chosen by")

    @model_validator(mode="after")
    def _known_methods(self) -> Recipe:
        for name, values in self.methods.items():
            if name not in METHODS or name == "rome":
                raise ValueError(f"methods: there is no other method {name!r}; known: {', '.join(METHODS)}")
            METHODS[name].parameters.model_validate(self.hparams_for(METHODS[name]) | values)
        if self.batch_method not in METHODS:
            raise ValueError(
                f"batch_method: there is no method {self.batch_method!r}; known: {', '.join(METHODS)}"
            )
        return self

    def hparams_for(self, method: EditMethod) -> dict[str, Any]:
        """What a method takes before anybody asks for anything: the recipe's own values for it, on top of those that it shares
        with "rome"."""
        rome = self.rome.model_dump()
        shared: tuple[str, ...] = ("layers",)
        if method.needs_covariance:
            shared = tuple(rome) if method.parameters is RomeParameters else _SHARED_HPARAMS
        return (
            {name: rome[name] for name in shared} | method.fixed_hparams | self.methods.get(method.name, {})
        )


def _published(
    source: str, layer: int, methods: dict[str, dict[str, Any]] | None = None, **changes: object
) -> Recipe:
    rome = RomeParameters.model_validate({"layers": (layer,), **changes})
    return Recipe(source=source, rome=rome, methods=methods or {})


def _multi_layer_hparams(
    layers: tuple[int, ...], ridge: float, **changes: object
) -> dict[str, dict[str, Any]]:
    """MEMIT's and AlphaEdit's layers (methods C.1, C.3)."""
    return {
        "memit": {"layers": layers, "ridge": ridge, **changes},
        "alphaedit": {"layers": layers, **changes},
    }


_EASYEDIT = {"steps": 25, "weight_decay": 1e-3}
_EASYEDIT_MULTI_LAYER = _multi_layer_hparams((4, 5, 6, 7, 8), 15_000.0, clamp=4.0)
_GPT2_XL = _multi_layer_hparams((13, 14, 15, 16, 17), 20_000.0) | {
    "ft": {"layers": (1,)},
    "ft-l": {"layers": (0,), "epsilon": 5e-4},
    "ft-attn": {"layers": (33,)},
}
_GPTJ = _multi_layer_hparams((3, 4, 5, 6, 7, 8), 15_000.0, steps=25) | {
    "ft": {"layers": (21,)},
    "ft-l": {"layers": (0,), "epsilon": 5e-5},
}

#: (model_type, layers, width) -> recipe (methods A.9, C, D.1)
PUBLISHED: dict[tuple[str, int, int], Recipe] = {
    ("gpt2", 24, 1024): _published("rome: gpt2-medium", 8, clamp=3.0),
    ("gpt2", 36, 1280): _published("rome: gpt2-large", 12),
    ("gpt2", 48, 1600): _published("rome: gpt2-xl", 17, _GPT2_XL),
    ("gptj", 28, 4096): _published("rome: gpt-j-6B", 5, _GPTJ),
    ("gpt_neox", 44, 6144): _published("memit: gpt-neox-20b", 15),
    ("llama", 32, 4096): _published(
        "EasyEdit: Llama-2-7b, Llama-3-8b", 5, _EASYEDIT_MULTI_LAYER, **_EASYEDIT
    ),
    ("llama", 28, 3072): _published("EasyEdit: Llama-3.2-3b", 5, _EASYEDIT_MULTI_LAYER, **_EASYEDIT),
    ("mistral", 32, 4096): _published("EasyEdit: Mistral-7b", 5, _EASYEDIT_MULTI_LAYER, **_EASYEDIT),
    ("qwen2", 28, 3584): _published("EasyEdit: Qwen2-7b, Qwen2.5-7b", 5, _EASYEDIT_MULTI_LAYER, **_EASYEDIT),
}


def published_recipe(model_type: str, layers: int, width: int) -> Recipe | None:
    """The published recipe of a model of this shape, if there is one."""
    return PUBLISHED.get((model_type, layers, width))


def get_method(name: str) -> EditMethod:
    try:
        return METHODS[name]
    except KeyError:
        raise InvalidInput(f"there is no method {name!r}; known: {', '.join(METHODS)}.", "method") from None


def resolve_hparams(
    recipe: Recipe | None, overrides: dict[str, object] | None, layers: int, method: str = "rome"
) -> Parameters:
    """The recipe with what the user asked for on top; every value of the result is meant and recorded."""
    edit_method = get_method(method)
    base = recipe.hparams_for(edit_method) if recipe is not None else edit_method.fixed_hparams
    if edit_method.default_depth is not None and (
        recipe is None or "layers" not in recipe.methods.get(method, {})
    ):
        base = base | {"layers": (int(edit_method.default_depth * layers),)}
    if "layers" not in base | (overrides or {}):
        raise InvalidInput(
            "no recipe is known for this model: name the layers to edit, for example "
            '"hparams": {"layers": [5]} (an early or middle layer serves best), let `palimpsest prepare` find a recipe, or '
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
    if isinstance(resolved, RomeParameters) and resolved.compat and method != "rome":
        raise InvalidInput('hparams.compat: the published form is one of the method "rome".', "hparams")
    invalid_layers = [x for x in resolved.layers if not 0 <= x < layers]
    if invalid_layers or len(set(resolved.layers)) < len(resolved.layers):
        raise InvalidInput(f"hparams.layers must name different layers from 0 to {layers - 1}.", "hparams")
    return resolved


def parse_recipe(text: str) -> Recipe:
    """A `recipe.json` from a model's folder."""
    try:
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        raise Misconfigured(f"recipe.json cannot be used: {error}") from None
