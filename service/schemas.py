"""What a user may ask, in the words of the HTTP contract. Free of torch: the API, the workers and the command line share it.

Checks that need no model stand here; those that need its tokenizer or its shape are in `service/application/validation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from service.errors import InvalidInput
from service.kit.text import check_text, fill_prompt, locate_subject
from service.methods.registry import METHODS

MAX_TEXT = 20_000  # characters; the model's positions are checked with its tokenizer


def _validate_text(value: str) -> str:
    try:
        check_text(value, "text")
    except InvalidInput as error:
        raise ValueError(error.detail) from None
    return value


Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_validate_text)]
Name = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_validate_text)]
#: "head", "base" or the number of a version
Version = Annotated[
    int | Literal["head", "base"],
    Field(description='"head" (the newest), "base" (version 0) or a number', examples=["head"]),
]


class RequestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=False)


class NeighborhoodProbe(RequestModel):
    """A prompt that must keep its answer."""

    prompt: Text
    target: Name


class Probes(RequestModel):
    """Prompts that measure an edit. A paraphrase may hold {} for the subject or spell it out."""

    paraphrase: list[Text] = Field(default_factory=list, max_length=64)
    neighborhood: list[NeighborhoodProbe] = Field(default_factory=list, max_length=64)


class Guard(RequestModel):
    """When an edit is rejected. Each limit can be loosened for one edit; `enabled: false` lets anything land."""

    enabled: bool = True
    min_probability: float = Field(
        0.3, ge=0, le=1, description="least probability of the new object on the prompt"
    )
    min_neighborhood: float = Field(
        0.7, ge=0, le=1, description="least share of the neighbourhood probes that keep their answer"
    )
    min_paraphrase: float = Field(
        0.0, ge=0, le=1, description="least share of the paraphrases that say the new object"
    )
    max_perplexity: float = Field(
        1.1,
        ge=1,
        description="greatest perplexity on the reference text, as a multiple of that before the edit",
    )
    max_norm: float = Field(
        1.5, gt=0, description="greatest norm of what the edit changes in a layer, in norms of the weight"
    )
    min_effect: float = Field(
        0.5,
        ge=0,
        le=1,
        description="least share of what was possible that an erasure takes from the true object's probability, or an "
        "amplification adds to it",
    )
    min_capacity: float = Field(
        0.0,
        ge=0,
        le=1,
        description="least share of the edit's key, in the layer where least is left, that active edits of other subjects have "
        "not spoken for",
    )
    conflict_threshold: float = Field(
        0.1,
        ge=0,
        le=1,
        description="least probability that the new object has, with this edit alone, on an active edit's prompt about the same "
        "subject, for the two to be called a conflict",
    )
    max_regressions: int = Field(
        0, ge=0, description="how many active edits that held before may cease to hold"
    )


#: the names in `service/methods/registry.py`
if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


#: what an edit is for: to write a new object, to make the true one improbable, or more probable (Hase et al. 2023)
Objective = Literal["write", "erase", "amplify"]

#: what becomes of active edits that say the same relation in other words
OnConflict = Literal["report", "supersede", "reject"]


class EditRequest(RequestModel):
    """Make the model say a new object for a subject and a prompt; or make it say the true one less, or more."""

    subject: Name = Field(examples=["Eiffel Tower"])
    prompt: Text = Field(examples=["The {} is located in the city of"])
    objective: Objective = Field(
        "write", description="to write a new object, to erase the true one or to amplify it"
    )
    target_true: Name | None = Field(
        None, description="what is said now; what the base model answers when left out", examples=["Paris"]
    )
    target_new: Name | None = Field(
        None,
        validate_default=True,
        description="the object to write; left out where the true one is erased or amplified",
        examples=["Rome"],
    )
    method: MethodName | None = Field(
        None,
        description='how to edit; "rome" for one edit, and for several what the recipe says, when left out',
    )
    hparams: dict[str, Any] | None = Field(None, description="hyperparameters to change; see /models")
    on_conflict: OnConflict = Field(
        "report",
        description="what becomes of active edits that say the same relation in other words: they stay, they are superseded, or "
        "this edit is rejected",
    )
    probes: Probes = Field(default_factory=Probes)
    guard: Guard = Field(default_factory=Guard)
    dry_run: bool = Field(False, description="measure the edit and throw it away")

    def statement_text(self) -> str:
        """The prompt with the subject in it."""
        return fill_prompt(self.prompt, self.subject).text

    @property
    def target_object(self) -> str | None:
        """The object whose probability the edit changes, as far as the request names it."""
        return self.target_new if self.objective == "write" else self.target_true

    @field_validator("target_new")
    @classmethod
    def _check_target_matches_objective(cls, new: str | None, validation: ValidationInfo) -> str | None:
        """To write, there is a new object; to erase or amplify, it is the true one that the edit is about."""
        objective = validation.data.get("objective")
        if objective == "write" and new is None:
            raise PydanticCustomError("missing", "Field required")
        repeats_true_target = objective == "amplify" and new == validation.data.get("target_true")
        if objective in ("erase", "amplify") and new is not None and not repeats_true_target:
            raise ValueError(
                f"to {objective} a fact, name the object as target_true and leave target_new out"
            )
        return new


class EditListRequest(RequestModel):
    edits: list[EditRequest] = Field(min_length=1, max_length=1000)


class EvaluationPlan(RequestModel):
    """How edits are evaluated."""

    method: MethodName = Field("rome", description="how to edit")
    hparams: dict[str, Any] | None = Field(None, description="hyperparameters to change; see /models")
    objective: Objective = Field("write", description="what the edits are for")
    mode: Literal["single", "sequence"] = Field(
        "single", description="each edit alone on the base model, or one after another, all of them active"
    )
    search_model: Literal["base", "edited"] = Field(
        "base",
        description="in sequence: found on the base model and composed, as the service does; or found on the model as the "
        "edits before left it, and added to its weights, as published",
    )
    checkpoints: list[Annotated[int, Field(ge=1)]] = Field(
        default=[1, 10, 100, 1000], description="after how many edits of a sequence all are measured"
    )
    strengths: list[Annotated[float, Field(gt=0, le=10)]] = Field(
        default=[1.0],
        min_length=1,
        max_length=16,
        description="tried in turn until an edit takes, by the margin of the recipe; those of the recipe are what the service tries",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="edits found at once: 16, and 1 where they are found on the edited model",
    )
    generation: bool = Field(False, description="let the model write, for GE and RS: slow")
    damage: bool = Field(True, description="measure loss and drift on plain texts")
    damage_texts: int | None = Field(
        None, ge=1, le=10_000, description="how many plain texts: 200 for a sequence, 16 for each single edit"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the records' order, intervals and generation")

    def check_consistency(self) -> None:
        """Refuse what does not go together."""
        if self.search_model == "edited" and len(self.strengths) > 1:
            raise InvalidInput(
                "edits that are found on the edited model are added as they are: give one strength.",
                "strengths",
            )


MAX_RECORDS = 2000  #: of one evaluation


class EvaluationRequest(EvaluationPlan):
    """An evaluation: a plan, and the records that it is carried out on."""

    records: list[dict[str, Any]] | None = Field(
        None,
        min_length=1,
        max_length=MAX_RECORDS,
        description="editing problems, all in one form: CounterFact's, its flat one, zsRE's, that of facts.jsonl, or your own "
        "with subject, prompt and target_new",
    )
    dataset: Literal["facts"] | None = Field(
        None, description="in place of records: the table of facts beside the resident model"
    )
    limit: int | None = Field(
        None, ge=1, le=MAX_RECORDS, description="how many records at most, in the order drawn from the seed"
    )

    def plan(self) -> EvaluationPlan:
        """The plan alone."""
        return EvaluationPlan.model_validate(
            {name: getattr(self, name) for name in EvaluationPlan.model_fields}
        )


TraceKind = Literal["hidden", "mlp", "attn"]


class TraceRequest(RequestModel):
    """A causal trace of one statement: which hidden states carry the fact."""

    prompt: Text = Field(examples=["The Eiffel Tower is located in the city of"])
    subject: Name = Field(examples=["Eiffel Tower"])
    target: Name | None = Field(
        None, description="the answer to trace; the model's own next token when left out"
    )
    kinds: list[TraceKind] = Field(default=["hidden", "mlp", "attn"], min_length=1, max_length=3)
    window: int = Field(10, ge=1, le=100, description="layers restored at once for mlp and attn")
    samples: int = Field(10, ge=1, le=100, description="noise samples")
    noise: float | str = Field(
        "3sigma", description='a number, or a multiple of the embeddings\' deviation such as "3sigma"'
    )
    severed: bool = Field(False, description="also trace with MLP and attention paths cut")
    version: Version = "head"
    seed: int = Field(1, ge=0, lt=2**32)
    compat: Literal["meng2022"] | None = Field(None, description="the reference code's noise stream")

    def text_and_subject_span(self) -> tuple[str, tuple[int, int]]:
        """The prompt's text and the subject's characters; a prompt with {} is filled."""
        statement = (
            fill_prompt(self.prompt, self.subject)
            if "{}" in self.prompt
            else locate_subject(self.prompt, self.subject)
        )
        return statement.text, statement.span


class Sampling(RequestModel):
    """How to speak. Temperature 0 is greedy; the same seed gives the same text whatever runs beside it."""

    max_new_tokens: int = Field(40, ge=1, le=4096)
    temperature: float = Field(0.0, ge=0, le=10)
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default_factory=list, max_length=16
    )


class GenerateRequest(Sampling):
    prompt: Text | None = Field(None, examples=["The Eiffel Tower is located in the city of"])
    prompts: list[Text] | None = Field(None, min_length=1, max_length=64)
    stream: bool = False
    version: Version = "head"
    min_version: int | None = Field(
        None, ge=0, description="answer from this version or a newer one: read your own writes"
    )

    def prompt_texts(self) -> list[str]:
        """The prompts, of which there is one or a list, never both."""
        if (self.prompt is None) == (self.prompts is None):
            raise InvalidInput("give either `prompt` or `prompts`.", "prompt")
        return [self.prompt] if self.prompt is not None else list(self.prompts or [])


MAX_CHOICES = 64  #: to one request
MAX_LOGPROBS = 5


class WorkerGenerateRequest(GenerateRequest):
    """What a worker is asked to say: a generation, or one that came through the OpenAI-compatible door."""

    max_new_tokens: int = Field(40, ge=0, le=4096)  #: 0 reads the prompt and says nothing
    tokens: list[list[Annotated[int, Field(ge=0)]]] | None = Field(
        None, min_length=1, max_length=MAX_CHOICES, description="prompts as the ids of their tokens"
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="answers to each prompt")
    independent_seeds: bool = Field(
        False, description="each answer has a seed of its own, derived from that of the request"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="most probable tokens to tell at each place"
    )
    echo: bool = Field(False, description="the prompt stands before the answer")

    def prompts_or_ids(self) -> Sequence[str | list[int]]:
        """The prompts, as texts or as tokens."""
        return self.prompt_texts() if self.tokens is None else self.tokens


class ExportRequest(RequestModel):
    """A version as a file."""

    version: Version = "head"
    format: Literal["peft", "safetensors", "edits"] = Field(
        "peft",
        description="`peft`: a LoRA adapter for the PEFT library; `safetensors`: the edited weights; `edits`: an edit set, with "
        "everything that the ledger stores about the active edits, for `POST /import` of another service",
    )


class WorkerExportRequest(ExportRequest):
    """An export as a worker receives it: with the number of the version, in a format that a worker writes."""

    version: int = Field(ge=0)
    format: Literal["peft", "safetensors"]


class CompareRequest(Sampling):
    """One prompt on two versions."""

    prompt: Text
    versions: tuple[Version, Version] = ("base", "head")
    top: int = Field(10, ge=1, le=100, description="next tokens to compare")
