"""Hyperparameters that several editing methods share. Torch-free: the API validates requests with them."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# where an edit is kept (docs/decisions/0028-gated-associations.md)
EditForm = Literal["weights", "gated"]

# how strong an edit is made; every method has these (docs/decisions/0010-strength-by-room.md)
Strengths = Annotated[
    tuple[Annotated[float, Field(gt=0, le=10)], ...],
    Field(
        min_length=1,
        max_length=16,
        description="factors of the change, tried in this order until the edit is effective next to the other active edits",
    ),
]
Margin = Annotated[
    float,
    Field(
        ge=0,
        le=20,
        description="minimum lead of the new object over the true one, in nats of mean log-probability",
    ),
]


def _check_increasing(pairs: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    if any(x1 <= x0 for (x0, _), (x1, _) in pairwise(pairs)):
        raise ValueError("the first numbers of the pairs must increase")
    return pairs


RequiredMargins = Annotated[
    tuple[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0, le=20)]], ...],
    AfterValidator(_check_increasing),
    Field(
        max_length=16,
        description="pairs (active edits / dimension of a key, required margin in nats), with increasing first numbers. "
        "The margin that a partial strength must reach is interpolated between them. Below the first pair edits "
        "start at full strength; without pairs `margin` is required",
    ),
]


class RomeParameters(BaseModel):
    """Hyperparameters of ROME (Meng et al. 2022, section 3.1 and appendix E)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: tuple[int, ...] = Field(min_length=1, max_length=16, description="edited layers, from 0")
    steps: int = Field(20, ge=1, le=200, description="optimization steps of the value")
    learning_rate: float = Field(0.5, gt=0, le=10, description="Adam's learning rate for the value")
    final_rate: float = Field(
        1.0,
        ge=0,
        le=1,
        description="learning rate of the last step as a share of the first; linear between them",
    )
    weight_decay: float = Field(0.5, ge=0, description="weight of |delta| / |v|^2")
    clamp: float = Field(4.0, gt=0, description="maximum |delta| as a multiple of |v|")
    kl_factor: float = Field(
        0.0625,
        ge=0,
        description="weight of the KL term that preserves the next-token distribution of the subject",
    )
    stop_loss: float = Field(0.05, ge=0, description="the optimization stops below this loss")
    stop_margin: float | None = Field(
        None,
        ge=0,
        le=20,
        description="the optimization also stops where each token of the object leads every other token by this many nats in all "
        "texts; not to erase",
    )
    restatement_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the loss that is measured in a restatement, in the chat form of a chat model; 0: none, as published",
    )
    subject_weight: float = Field(
        1.0, ge=0, le=10, description="weight of the subject's name in the answer of the restatement"
    )
    subject_token: Literal["last", "first", "traced"] = Field(
        "last",
        description="the edited token of the subject: the last, as published, the first, or the one at which a causal trace of the prompt peaks at the edited layers",
    )
    contexts: int = Field(20, ge=0, le=100, description="sampled contexts in addition to the bare prompt")
    seed: int = Field(
        0, ge=0, lt=2**63, description="seed of the contexts, and of the trace of the subject's token"
    )
    bare_keys: bool = Field(
        False, description="average the key also over the subject without its prompt, after each context"
    )
    anchor: Literal["bare", "own"] = Field(
        "bare",
        description='"bare": the averaged key maps to v + delta of the bare prompt; "own": each text keeps its value, plus delta',
    )
    bare_weight: float | None = Field(
        None,
        ge=0,
        le=1,
        description="weight of the text without a context in the mean key; equal weights when left out, as published",
    )
    strength: float = Field(
        1.0,
        gt=0,
        le=10,
        description="factor of the change of value; above 1 it makes up for the early stop of the optimization",
    )
    form: EditForm = Field(
        "weights",
        description='"weights": the edit is solved into the weight of its layer; "gated": its change is looked up and added where the '
        "subject stands",
    )
    gate_threshold: float = Field(
        0.5,
        gt=-1,
        lt=1,
        description="whitened cosine with a key of the edit above which a gated edit acts",
    )
    compat: Literal["meng2022"] | None = Field(
        None, description="the asymmetric key of the published ROME in place of r-ROME's"
    )
    ridge: float = Field(
        1e-3,
        gt=0,
        le=100,
        description="ridge of the isolation between subjects whose keys nearly coincide, as a multiple of the mean key",
    )
    strengths: Strengths = (1.0, 1.25, 1.5, 2.0)
    margin: Margin = 0.0
    required_margins: RequiredMargins = ()


class FineTuneParameters(BaseModel):
    """Hyperparameters of fine-tuning one weight on the statement (Meng et al. 2022, appendix E)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: tuple[int, ...] = Field(min_length=1, max_length=16, description="trained layers, from 0")
    steps: int = Field(25, ge=1, le=1000, description="maximum training steps")
    learning_rate: float = Field(5e-4, gt=0, le=10, description="Adam's learning rate")
    weight_decay: float = Field(0.0, ge=0, description="Adam's weight decay")
    epsilon: float | None = Field(
        None, gt=0, description="maximum change of an entry; no limit when left out"
    )
    stop_loss: float = Field(1e-2, ge=0, description="training stops below this loss")
    strengths: Strengths = (1.0, 1.25, 1.5, 2.0)
    margin: Margin = 0.0
    required_margins: RequiredMargins = ()


class GraceParameters(BaseModel):
    """Hyperparameters of GRACE (Hartvigsen et al. 2023, section 2), with the names of the authors' code in brackets."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: tuple[int, ...] = Field(
        min_length=1,
        max_length=16,
        description="the layer whose output is replaced; one, from 0 (inner_params)",
    )
    steps: int = Field(
        50, ge=1, le=1000, description="optimization steps of the value (n_iter; authors: 100)"
    )
    learning_rate: float = Field(
        0.1, gt=0, le=10, description="Adam's learning rate for the value (edit_lr; authors: 1)"
    )
    stop_loss: float = Field(
        1e-2, ge=0, description="the optimization stops below this loss; 0: at no loss, as published"
    )
    start: Literal["warm", "cold"] = Field(
        "warm",
        description='the value before the first step: "warm", the output of the layer; "cold", numbers drawn from [0, 1) '
        "(val_init; authors: cold)",
    )
    seed: int = Field(0, ge=0, lt=2**63, description='seed of the numbers of the start "cold"')
    radius: float = Field(
        0.1,
        ge=0,
        le=1e6,
        description="the radius of the ball around a new key, in `radius_unit` (eps; authors: 1)",
    )
    radius_unit: Literal["key", "absolute"] = Field(
        "key",
        description='"key": the radius is a multiple of the norm of the key; "absolute": a number, as published',
    )
    compat: Literal["hartvigsen2023"] | None = Field(
        None,
        description="the radii of the published code, which depend on the order of the edits, in place of those that are "
        "a function of the set of edits",
    )
    strengths: Strengths = (1.0,)
    margin: Margin = 0.0
    required_margins: RequiredMargins = ()


MAX_OBJECT_TOKENS = 64  #: of an edit that has a key for each token of its object


class GradientParameters(BaseModel):
    """Hyperparameters of UltraEdit (Gu et al. 2026, section 3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: tuple[int, ...] = Field(min_length=1, max_length=16, description="edited layers, from 0")
    eta: float = Field(
        3e-4,
        ge=0,
        le=100,
        description="factor of the change of value, eta |h^|^2 g^; the change is linear in it (authors, models of 7 B: 1e-6)",
    )
    ridge: float = Field(
        3.0,
        gt=0,
        le=1e9,
        description='lambda: "ultraedit": the number of average keys that the statistics weigh against one token; '
        '"ultraedit-identity": added to the squared norms of keys (authors: 1)',
    )
    strengths: Strengths = (1.0, 1.25, 1.5, 2.0)
    margin: Margin = 0.0
    required_margins: RequiredMargins = ()


MAX_NEURONS = 20  #: of an edit by knowledge neurons


class NeuronParameters(BaseModel):
    """Hyperparameters of knowledge neurons (Dai et al. 2022, sections 3 and 4.3)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: tuple[int, ...] = Field(
        min_length=1, max_length=256, description="layers whose neurons are looked at, from 0; by default all"
    )
    nodes: int = Field(
        50, ge=1, le=200, description="midpoints of the integral of the gradient (authors: 20 left ends)"
    )
    threshold: float = Field(
        0.2, gt=0, le=1, description="least attribution of a neuron in a prompt, as a share of the greatest"
    )
    share: float = Field(
        0.7,
        gt=0,
        le=1,
        description="share of the prompts in which a neuron of the fact is found, before it is moved",
    )
    contexts: int = Field(4, ge=0, le=100, description="sampled contexts in addition to the bare prompt")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the contexts")
    old_weight: float = Field(
        1.0,
        ge=0,
        le=1000,
        description="factor of the embedding that is subtracted, that of the model's own answer",
    )
    new_weight: float = Field(
        8.0, ge=0, le=1000, description="factor of the embedding that is added, that of the new object"
    )
    strengths: Strengths = (1.0,)
    margin: Margin = 0.0
    required_margins: RequiredMargins = ()


class SeracParameters(BaseModel):
    """Hyperparameters of SERAC (Mitchell et al. 2022). Those of its classifier are chosen when it is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    layers: tuple[int, ...] = Field(
        min_length=1,
        max_length=16,
        description="the layer whose hidden states the classifier reads; one, from 0, for which a classifier is trained",
    )
    subject_gate: bool = Field(
        True,
        description="only prompts that contain the subject, or one of `aliases`, can be within the scope",
    )
    aliases: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(
        (), max_length=16, description="other names of the subject"
    )
    threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="least similarity of a prompt within the scope; default: that of the classifier",
    )
    divider: Literal["\n", "\n\n", " "] = Field(
        "\n", description="what stands between the statement and a prompt"
    )
    strengths: Strengths = (1.0,)
    margin: Margin = 0.0
    required_margins: RequiredMargins = ()


Parameters = (
    RomeParameters
    | FineTuneParameters
    | GraceParameters
    | GradientParameters
    | NeuronParameters
    | SeracParameters
)
