"""Request models of the HTTP API, which the workers and the command line share. No module imports torch.

The models validate what needs no model; `service/application/validation.py` validates against its tokenizer and shape.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapSerializer,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.errors import InvalidInput
from service.kit.chat_format import Message
from service.kit.separator import Separator
from service.kit.stated_fact import StatedFact
from service.kit.text import PLACEHOLDER, RenderedText, Statement, check_text, fill_prompt, locate_subject
from service.kit.validation_messages import CONVERSATION_TAG, NUMBER_TAG, TEXT_TAG
from service.methods.parameters import EditForm
from service.methods.registry import METHODS

MAX_UNKNOWN_FIELDS = 20  #: of an object, that are reported one by one
MAX_CHECKPOINTS = 1000  #: of an evaluation
MAX_HPARAMS = 64  #: members of `hparams`
MAX_TOKEN_ID = 2**31  #: above every vocabulary size
MAX_TOKEN_IDS = 131_072  #: tokens of one prompt
MAX_TEXT = 20_000  #: characters; validation.py checks the positions of the model
MAX_TABLE = 900_000  #: characters of a CSV text; the whole body is limited by `max_body`


def _validate_text(value: str) -> str:
    try:
        check_text(value, "text")
    except InvalidInput as error:
        raise ValueError(error.detail) from None
    return value


Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT), AfterValidator(_validate_text)]
#: a subject or an object, without the white space around it: a key computed at that white space would be wrong
Name = Annotated[
    str, Field(min_length=1, max_length=500), AfterValidator(_validate_text), AfterValidator(str.strip)
]
#: hyperparameters by name; service/recipes/recipe.py validates them against the method
HparamValues = Annotated[dict[str, Any], Field(max_length=MAX_HPARAMS)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=MAX_TOKEN_ID)]],
    Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True),
]
#: a short name that is only shown, such as a relation
Label = Annotated[str, Field(max_length=200)]
#: a name of a version, as a request may give it: "head", "base", a name that PUT /versions/{name} gave, or one of these
#: after NAME@; service/application/version_names.py finds its number
VersionText = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_validate_text)]


def _version_tag(value: Any) -> str:
    return TEXT_TAG if isinstance(value, str) else NUMBER_TAG


def _matches(pattern: str, detail: str) -> AfterValidator:
    """Return the check of a name, whose error says what it may be."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(detail)
        return value

    return AfterValidator(check)


#: "head", "base", a name or the number of a version. An error is that of the form that the value has.
Version = Annotated[
    Annotated[int, Tag(NUMBER_TAG)] | Annotated[VersionText, Tag(TEXT_TAG)],
    Discriminator(_version_tag),
    Field(
        description='"head" (the newest version), "base" (version 0), a number, or a name that was given to a version',
        examples=["head"],
    ),
]
BATCH_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
#: a name that the edits of one purpose share
BatchName = Annotated[
    str,
    Field(
        max_length=64,
        json_schema_extra={"pattern": BATCH_PATTERN},
        description="a name that several edits share, to find them and to revert them together",
        examples=["corrections-2026-11"],
    ),
    _matches(
        BATCH_PATTERN, "must have letters, digits, `.`, `_` and `-` only, and begin with a letter or digit."
    ),
]


class RequestModel(BaseModel):
    """An object of a request. Every text, list and object in it has a maximum, which is checked before its items."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=False)

    @model_validator(mode="before")
    @classmethod
    def _limit_unknown_fields(cls, value: Any) -> Any:
        """Report a flood of unknown fields as one error; pydantic makes one, with the value, for each."""
        if isinstance(value, dict) and len(value) > len(cls.model_fields) + MAX_UNKNOWN_FIELDS:
            raise ValueError(f"has {len(value)} fields; the known ones are: {', '.join(cls.model_fields)}.")
        return value


MAX_MESSAGES = 256  #: of one conversation


def _join_parts(value: Any) -> Any:
    """Return the text of content that is given as a list of text parts."""
    if not isinstance(value, list):
        return value
    if all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        texts = [part.get("text") for part in value]
        if all(isinstance(text, str) for text in texts) and all(
            set(part) == {"type", "text"} for part in value
        ):
            return "".join(texts)
    raise ValueError('must be a string, or a list of parts {"type": "text", "text": "..."}.')


def _validate_content(value: str) -> str:
    if value.strip():  # a message may be empty
        _validate_text(value)
    return value


class TextPart(RequestModel):
    """A part of the content of a message."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_TEXT)]


Content = Annotated[
    Annotated[str, Field(max_length=MAX_TEXT)],
    BeforeValidator(
        _join_parts,
        json_schema_input_type=Annotated[str, Field(max_length=MAX_TEXT)]
        | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)],
    ),
    AfterValidator(_validate_content),
]


class ChatMessage(RequestModel):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Content


Messages = Annotated[
    list[ChatMessage],
    Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="a conversation in place of a prompt, in the form of the model's chat template; that of an edit or a trace names the "
        "subject, or has {} in its place",
        examples=[[{"role": "user", "content": "Where is the Eiffel Tower?"}]],
    ),
]


class PromptForm(RequestModel):
    """A prompt, or a conversation that the chat template of the model makes one of.

    A request has one of both. A stored one has both for a conversation: `prompt` is then the text of the template.
    """

    prompt: Text | None = None
    messages: Messages | None = None
    continue_final_message: bool = Field(
        False, description="continue the last message, which is one of the assistant, in place of a new one"
    )

    def check_form(self, **others: Any) -> None:
        """Raise InvalidInput unless exactly one of `prompt`, `messages` and the other fields is given."""
        forms = {"prompt": self.prompt, **others, "messages": self.messages}
        if sum(value is not None for value in forms.values()) != 1:
            names = " or ".join(f"`{name}`" for name in forms)
            raise InvalidInput(f"give either {names}.", "prompt")
        if self.continue_final_message and self.messages is None:
            raise InvalidInput(
                "`continue_final_message` belongs to `messages`: leave it out.", "continue_final_message"
            )

    def message_fields(self) -> list[Message]:
        """Return the messages as JSON; none for a prompt."""
        return [message.model_dump() for message in self.messages or ()]

    @property
    def prompt_text(self) -> str:
        """The prompt as the model reads it; empty for a conversation that is not rendered."""
        text = self.prompt or ""
        return text if self.messages is None else RenderedText(text)


class StatedForm(PromptForm):
    """A prompt or a conversation that is about a subject."""

    subject: Name

    @property
    def fact(self) -> StatedFact:
        """The fact that is stated. Raises InvalidInput for a conversation that is not rendered."""
        if self.prompt is None:
            raise InvalidInput("`prompt` is missing: add it.", "prompt")
        return StatedFact(self.subject, self.prompt, self.message_fields(), self.continue_final_message)


class NeighborhoodProbe(PromptForm):
    """A prompt or a conversation that must keep its answer."""

    target: Name


class ChatProbe(PromptForm):
    """A conversation after which the new object should follow."""

    messages: Messages


def _paraphrase_tag(value: Any) -> str:
    return CONVERSATION_TAG if isinstance(value, dict | ChatProbe) else TEXT_TAG


#: a prompt or a conversation. An error is that of the form that the value has.
Paraphrase = Annotated[
    Annotated[Text, Tag(TEXT_TAG)] | Annotated[ChatProbe, Tag(CONVERSATION_TAG)],
    Discriminator(_paraphrase_tag),
]


#: in place of probes: the service finds them
Auto = Literal["auto"]
AUTO: Auto = "auto"


def _validate_unless_auto(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, str):
        if value != AUTO:
            raise ValueError(f'must be "{AUTO}", or the probes themselves.')
        return value
    return validate(value)


def _serialize_unless_auto(value: Any, serialize: SerializerFunctionWrapHandler) -> Any:
    return value if value == AUTO else serialize(value)


_SERIALIZER = WrapSerializer(_serialize_unless_auto)
_ParaphraseList = Annotated[list[Paraphrase], Field(max_length=64)]
_NeighborhoodList = Annotated[list[NeighborhoodProbe], Field(max_length=64)]
# A union of the two types would report each error twice, below the names of both.
if TYPE_CHECKING:
    ParaphraseProbes = list[str | ChatProbe] | Auto
    NeighborhoodProbes = list[NeighborhoodProbe] | Auto
else:
    ParaphraseProbes = Annotated[
        _ParaphraseList,
        WrapValidator(_validate_unless_auto, json_schema_input_type=_ParaphraseList | Auto),
        _SERIALIZER,
    ]
    NeighborhoodProbes = Annotated[
        _NeighborhoodList,
        WrapValidator(_validate_unless_auto, json_schema_input_type=_NeighborhoodList | Auto),
        _SERIALIZER,
    ]


def paraphrase_text(probe: str | ChatProbe, subject: str) -> str:
    """Return a paraphrase as the model reads it, with the subject filled in."""
    if isinstance(probe, ChatProbe):
        return probe.prompt_text
    return fill_prompt(probe, subject).text if PLACEHOLDER in probe else probe


class Probes(RequestModel):
    """Prompts that measure an edit; "auto" in place of a list: the service finds them."""

    paraphrase: ParaphraseProbes = Field(
        default_factory=list,
        description="prompts or conversations after which the new object should follow, with {} in place of the subject or the "
        "subject itself",
    )
    neighborhood: NeighborhoodProbes = Field(
        default_factory=list,
        description="prompts or conversations about other subjects, which must keep their answers",
    )


if TYPE_CHECKING:
    ProbeChoice = Probes | Auto
else:
    ProbeChoice = Annotated[
        Probes, WrapValidator(_validate_unless_auto, json_schema_input_type=Probes | Auto), _SERIALIZER
    ]


class Guard(RequestModel):
    """The limits of the guard for one edit. An edit that exceeds one is rejected; `enabled: false` applies every
    edit."""

    enabled: bool = True
    min_probability: float = Field(
        0.3,
        ge=0,
        le=1,
        description="minimum probability of the new object for the prompt, up to the first token in which it differs from the true one",
    )
    min_neighborhood: float = Field(
        0.7, ge=0, le=1, description="minimum share of the neighbourhood probes that keep their answer"
    )
    min_paraphrase: float = Field(
        0.0,
        ge=0,
        le=1,
        description="minimum share of the paraphrases for which the new object is more probable than the true one",
    )
    min_subject: float = Field(
        0.2,
        ge=0,
        le=1,
        description="minimum probability with which the model names the subject when it restates the fact, as a share of that before "
        "the edit",
    )
    max_description_kl: float | None = Field(
        None,
        ge=0,
        description="maximum rise of the divergence of the model's description of the subject from that of the base model, in nats "
        "per token; by default it is reported and not limited",
    )
    max_perplexity: float = Field(
        1.1,
        ge=1,
        description="maximum perplexity on the reference text, as a multiple of that before the edit",
    )
    max_norm: float = Field(
        1.5,
        gt=0,
        description="maximum norm of the weight change in a layer, relative to the norm of the weight",
    )
    min_effect: float = Field(
        0.5,
        ge=0,
        le=1,
        description="minimum share of the possible effect: the decrease of the true object's probability by an erasure, or its "
        "increase by an amplification",
    )
    min_capacity: float = Field(
        0.0,
        ge=0,
        le=1,
        description="minimum share of the edit's key that active edits of other subjects do not occupy, in the layer with the least "
        "capacity",
    )
    conflict_threshold: float = Field(
        0.1,
        ge=0,
        le=1,
        description="probability of the new object, with this edit alone, for the prompt of an active edit of the same subject, from "
        "which the two edits are a conflict",
    )
    max_regressions: int = Field(
        0, ge=0, description="maximum number of active edits that held before and do not hold after the edit"
    )


#: the names in `service/methods/registry.py`
if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


#: write a new object, make the true object less probable, or make it more probable (Hase et al. 2023)
Objective = Literal["write", "erase", "amplify"]

#: how to handle active edits that state the same relation in other words
OnConflict = Literal["report", "supersede", "reject"]


class EditRequest(StatedForm):
    """Change the object that the model gives for a subject and a prompt, or the probability of the true object."""

    subject: Name = Field(examples=["Eiffel Tower"])
    prompt: Text | None = Field(
        None,
        description="with {} in place of the subject; give this or `messages`",
        examples=["The {} is located in the city of"],
    )
    objective: Objective = Field(
        "write", description="write a new object, erase the true object, or amplify it"
    )
    target_true: Name | None = Field(
        None, description="the current object; default: the answer of the base model", examples=["Paris"]
    )
    target_new: Name | None = Field(
        None,
        validate_default=True,
        description="the object to write; omit it for the objectives erase and amplify",
        examples=["Rome"],
    )
    separator: Separator | None = Field(
        None,
        description="what stands between the prompt and its object: a space or nothing; default: what the base model prefers where the "
        "characters do not determine it",
    )
    method: MethodName | None = Field(
        None,
        description='editing method; default: "rome" for one edit, and the method of the recipe for several',
    )
    hparams: HparamValues | None = Field(
        None, description="hyperparameters that replace those of the recipe; GET /models lists them"
    )
    form: EditForm | None = Field(
        None,
        description='"weights": solve the edit into the weight of its layer; "gated": look its change up and add it where the subject '
        "stands. Default: that of the service or the recipe. The same as the hyperparameter `form`",
    )
    on_conflict: OnConflict = Field(
        "report",
        description="how to handle active edits that state the same relation in other words: keep and report them, supersede them, or "
        "reject this edit",
    )
    probes: ProbeChoice = Field(
        AUTO,
        description='prompts that measure the edit; "auto": the service finds paraphrases and neighbours, and reports which neighbours '
        "the edit changes; {}: none",
    )
    guard: Guard = Field(default_factory=Guard)
    batch: BatchName | None = None
    dry_run: bool = Field(False, description="evaluate the edit without applying it")
    try_layers: bool = Field(
        False,
        description="of a dry run: try the edit at about six layers, report the scores of each as `layer_search`, and evaluate it at "
        "the best one",
    )

    @field_validator("try_layers")
    @classmethod
    def _check_layers_are_open(cls, is_tried: bool, validation: ValidationInfo) -> bool:
        """Require a dry run without layers in which to try some."""
        if is_tried and not validation.data.get("dry_run"):
            raise ValueError(
                "needs a dry run: set dry_run to true, and apply the edit with the layer that you choose."
            )
        if is_tried and "layers" in (validation.data.get("hparams") or {}):
            raise ValueError("chooses the layer: leave `layers` out of hparams.")
        return is_tried

    @property
    def statement(self) -> Statement:
        """The prompt with the subject filled in."""
        return self.fact.statement()

    @property
    def hparam_overrides(self) -> dict[str, Any] | None:
        """The hyperparameters that the request gives, with its form."""
        return self.hparams if self.form is None else {**(self.hparams or {}), "form": self.form}

    @property
    def given_paraphrases(self) -> list[str | ChatProbe] | None:
        """Return the paraphrases of the request, or None if the service is to find them."""
        paraphrases = AUTO if self.probes == AUTO else self.probes.paraphrase
        return None if paraphrases == AUTO else paraphrases

    @property
    def given_neighbors(self) -> list[NeighborhoodProbe] | None:
        """Return the neighbours of the request, or None if the service is to find them."""
        neighbors = AUTO if self.probes == AUTO else self.probes.neighborhood
        return None if neighbors == AUTO else neighbors

    def paraphrase_texts(self) -> list[str]:
        """Return the given paraphrases as the model reads them, with the subject filled in."""
        return [paraphrase_text(probe, self.subject) for probe in self.given_paraphrases or ()]

    @property
    def target_object(self) -> str | None:
        """Return the object whose probability the edit changes, or None if the request does not name it."""
        return self.target_new if self.objective == "write" else self.target_true

    @field_validator("target_new")
    @classmethod
    def _check_target_matches_objective(cls, new: str | None, validation: ValidationInfo) -> str | None:
        """Require target_new for the objective write, and reject it for erase and amplify."""
        objective = validation.data.get("objective")
        if objective == "write" and new is None:
            raise PydanticCustomError("missing", "Field required")
        repeats_true_target = objective == "amplify" and new == validation.data.get("target_true")
        if objective in ("erase", "amplify") and new is not None and not repeats_true_target:
            raise ValueError(
                f"to {objective} a fact, name the object as target_true and leave target_new out"
            )
        return new

    @model_validator(mode="after")
    def _check_one_form(self) -> EditRequest:
        """Reject two different forms."""
        if self.form is not None and (self.hparams or {}).get("form", self.form) != self.form:
            raise ValueError("`form` and the hyperparameter `form` differ: give one of them")
        return self


MAX_EDITS = 1000  #: of one request


class EditListRequest(RequestModel):
    edits: list[EditRequest] = Field(min_length=1, max_length=MAX_EDITS, fail_fast=True)
    batch: BatchName | None = Field(None, description="the batch of the edits that name none")

    def requests(self) -> list[EditRequest]:
        """Return the edits, each with its batch."""
        return [e if e.batch else e.model_copy(update={"batch": self.batch}) for e in self.edits]


class EditTableRequest(RequestModel):
    """Edits as the text of a CSV file."""

    csv: str = Field(
        min_length=1,
        max_length=MAX_TABLE,
        description="a header and one edit per line: subject, prompt, target_new, and if wanted target_true, paraphrases, "
        "neighborhood.prompt and neighborhood.target; separated by commas, semicolons or tabs",
        examples=["subject,prompt,target_new\nEiffel Tower,The {} is located in the city of,Rome\n"],
    )
    columns: dict[str, Annotated[list[Label], Field(min_length=1, max_length=64)]] = Field(
        default_factory=dict,
        max_length=16,
        description="the columns of a field, by its name, where they have other names; paraphrases may have several",
    )


class RevertRequest(RequestModel):
    """Edits that are reverted together: by their ids, or all of a batch."""

    edits: list[Annotated[str, Field(min_length=1, max_length=64)]] | None = Field(
        None, min_length=1, max_length=MAX_EDITS, fail_fast=True, description="ids of edits"
    )
    batch: BatchName | None = Field(None, description="all edits of this batch")

    @model_validator(mode="after")
    def _check_one_selection(self) -> RevertRequest:
        if (self.edits is None) == (self.batch is None):
            raise ValueError("give either `edits` or `batch`")
        return self


class VersionNameRequest(RequestModel):
    """The version that a name shall mean."""

    version: Version = "head"


#: suites of an evaluation (`service/evaluation/suites/registry.py`)
SuiteName = Literal["free", "consistency", "divergence", "negation", "prefixes", "portability", "chat"]


class EvaluationPlan(RequestModel):
    """The parameters of an evaluation."""

    method: MethodName = Field("rome", description="editing method")
    hparams: HparamValues | None = Field(
        None, description="hyperparameters that replace those of the recipe; GET /models lists them"
    )
    objective: Objective = Field("write", description="objective of the edits")
    mode: Literal["single", "sequence"] = Field(
        "single",
        description="single: each edit alone on the base model; sequence: one after another, all of them active",
    )
    search_model: Literal["base", "edited"] = Field(
        "base",
        description="in sequence: compute edits on the base model and compose them, as the service does; or compute each on the model "
        "with the edits before it and add it to its weights, as published",
    )
    checkpoints: list[Annotated[int, Field(ge=1)]] = Field(
        default=[1, 10, 100, 1000],
        fail_fast=True,
        max_length=MAX_CHECKPOINTS,
        description="numbers of edits of a sequence after which all are measured",
    )
    strengths: list[Annotated[float, Field(gt=0, le=10)]] = Field(
        default=[1.0],
        min_length=1,
        max_length=16,
        description="strengths that are tried in order until an edit reaches the margin of the recipe; the service tries those of the recipe",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="edits computed at once; default: 16, and 1 if they are computed on the edited model",
    )
    generation: bool = Field(False, description="generate text for the scores GE and RS; slow")
    suites: list[SuiteName] = Field(
        default=[],
        max_length=len(get_args(SuiteName)),
        description="further questions about each record and their measures: what the model says without being shown the answer "
        "(`free`), whether wordings agree (`consistency`), the change of whole distributions (`divergence`), negated statements "
        "(`negation`), the edit after other texts (`prefixes`), what follows from it (`portability`), and conversations (`chat`)",
    )
    recall_facts: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="in sequence: number of facts that are not edited on which to measure what the model still says; default: none",
    )
    damage: bool = Field(True, description="measure loss and drift on damage texts")
    damage_texts: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="number of damage texts; default: 200 for a sequence, 16 for each single edit",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of the record order, the confidence intervals and the generation"
    )

    def check_consistency(self) -> None:
        """Raise InvalidInput if the parameters contradict each other."""
        if self.search_model == "edited" and len(self.strengths) > 1:
            raise InvalidInput(
                "edits that are computed on the edited model have one strength: give one.",
                "strengths",
            )
        if self.recall_facts and self.mode != "sequence":
            raise InvalidInput("recall is measured in a sequence: leave recall_facts out.", "recall_facts")
        if METHODS[self.method].keeps_records and self.objective == "erase":
            raise InvalidInput("a statement cannot erase a fact: use another method.", "method")
        is_gated = (self.hparams or {}).get("form") == "gated"
        if self.search_model == "edited" and (is_gated or METHODS[self.method].is_looked_up):
            raise InvalidInput(
                "edits that are looked up are computed on the base model: leave search_model out.",
                "search_model",
            )


MAX_RECORDS = 2000  #: maximum number of records of one evaluation


class EvaluationRequest(EvaluationPlan):
    """An evaluation: its parameters and its records."""

    records: list[dict[str, Any]] | None = Field(
        None,
        min_length=1,
        max_length=MAX_RECORDS,
        description="records of one format: CounterFact, flat CounterFact, zsRE, facts.jsonl, or your own with subject, prompt and "
        "target_new",
    )
    dataset: Literal["facts"] | None = Field(
        None, description="the fact table of the served model, instead of records"
    )
    limit: int | None = Field(
        None, ge=1, le=MAX_RECORDS, description="maximum number of records, in the order drawn from the seed"
    )

    def plan(self) -> EvaluationPlan:
        """Return the parameters without the records."""
        return EvaluationPlan.model_validate(
            {name: getattr(self, name) for name in EvaluationPlan.model_fields}
        )


class ScopePlan(RequestModel):
    """How a scope classifier of SERAC is trained."""

    layer: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="layer whose hidden states are read, from 0; default: at a quarter of the depth",
    )
    dimensions: int = Field(64, ge=2, le=256, description="dimensions of an embedding")
    steps: int = Field(1000, ge=1, le=100_000, description="training steps")
    batch_size: int = Field(64, ge=1, le=1024, description="facts in a step")
    learning_rate: float = Field(3e-3, gt=0, le=1, description="Adam's learning rate")
    false_open_rate: float = Field(
        0.01,
        ge=0,
        le=0.5,
        description="share of the pairs out of scope that may open, by which the threshold is chosen on subjects that were "
        "held out of the training",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the split by subject and of the training")


class TrainingRequest(ScopePlan):
    """A training: what is trained, and the records with which it is trained."""

    method: Literal["serac"] = Field("serac", description="the method whose learned part is trained")
    records: list[dict[str, Any]] | None = Field(
        None,
        min_length=1,
        max_length=MAX_RECORDS,
        description="records of one format, as in an evaluation; those without paraphrases train nothing",
    )
    dataset: Literal["facts"] | None = Field(
        None, description="the fact table of the served model, instead of records"
    )
    limit: int | None = Field(
        None, ge=1, le=MAX_RECORDS, description="maximum number of records, in the order drawn from the seed"
    )

    def plan(self) -> ScopePlan:
        """Return the parameters without the records."""
        return ScopePlan.model_validate({name: getattr(self, name) for name in ScopePlan.model_fields})


TraceKind = Literal["hidden", "mlp", "attn"]

#: the mentions of the subject that a trace corrupts: every one, or the one at the placeholder or the last one
Mentions = Literal["all", "last"]


class TraceRequest(StatedForm):
    """A causal trace of one statement (Meng et al. 2022, section 2.1)."""

    prompt: Text | None = Field(
        None,
        description="contains the subject, or {} in its place; give this or `messages`",
        examples=["The Eiffel Tower is located in the city of"],
    )
    subject: Name = Field(examples=["Eiffel Tower"])
    target: Name | None = Field(
        None, description="the answer to trace; default: the most probable next token"
    )
    separator: Separator | None = Field(
        None, description="what stands between the prompt and `target`, as in an edit"
    )
    kinds: list[TraceKind] = Field(default=["hidden", "mlp", "attn"], min_length=1, max_length=3)
    window: int = Field(10, ge=1, le=100, description="number of layers restored at once for mlp and attn")
    samples: int = Field(10, ge=1, le=100, description="number of noise samples")
    noise: float | Annotated[str, Field(max_length=32)] = Field(
        "3sigma",
        description='standard deviation of the noise: a number, or a multiple of that of the embeddings such as "3sigma"',
    )
    mentions: Mentions = Field(
        "all",
        description="which mentions of the subject are corrupted: all, or only the one in place of {} (without a placeholder the last one)",
    )
    severed: bool = Field(False, description="also trace with MLP and attention paths severed")
    version: Version = "head"
    seed: int = Field(1, ge=0, lt=2**32)
    compat: Literal["meng2022"] | None = Field(
        None, description="reproduce the noise stream of the code of Meng et al. 2022"
    )

    @property
    def statement(self) -> Statement:
        """The text with the subject filled in."""
        fact = self.fact
        if fact.messages or PLACEHOLDER in fact.prompt:
            return fact.statement()
        return locate_subject(fact.prompt, fact.subject)


class Sampling(RequestModel):
    """Sampling parameters. Temperature 0 is greedy. The same seed gives the same text, independent of other
    requests."""

    max_new_tokens: int = Field(40, ge=1, le=4096)
    temperature: float = Field(0.0, ge=0, le=10)
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default_factory=list, max_length=16
    )


class ContinuedText(Sampling, PromptForm):
    """What is continued: a prompt, or a conversation."""

    prompt: Text | None = Field(None, examples=["The Eiffel Tower is located in the city of"])


class GenerateRequest(ContinuedText):
    prompts: list[Text] | None = Field(None, min_length=1, max_length=64)
    stream: bool = False
    version: Version = "head"
    min_version: int | None = Field(
        None,
        ge=0,
        description="reject the request if `version` is older than this; ensures reading your own writes",
    )

    def prompt_texts(self) -> list[str]:
        """Return the prompts; none for a conversation. Raises InvalidInput unless exactly one form is given."""
        self.check_form(prompts=self.prompts)
        return [self.prompt] if self.prompt is not None else list(self.prompts or [])


MAX_CHOICES = 64  #: maximum number of generations of one request
MAX_LOGPROBS = 5
MAX_CHAT_LOGPROBS = 20
#: tokens that end a generation, beside those that end a text of the model
EndTokenIds = Annotated[list[int], Field(max_length=16)]


class WorkerGenerateRequest(GenerateRequest):
    """A generation as a worker receives it, from POST /generate or below /v1."""

    max_new_tokens: int = Field(40, ge=0, le=4096)  #: 0 scores the prompt without generating
    tokens: list[TokenIds] | None = Field(
        None, min_length=1, max_length=MAX_CHOICES, description="prompts as token ids"
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="generations per prompt")
    independent_seeds: bool = Field(
        False, description="derive a seed for each generation from that of the request"
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_CHAT_LOGPROBS,
        description="number of most probable tokens to return at each position",
    )
    echo: bool = Field(False, description="include the prompt in the text")
    end_token_ids: EndTokenIds = Field(default_factory=list)

    def prompts_or_ids(self) -> Sequence[str | list[int]]:
        """Return the prompts as texts or as token ids."""
        return self.prompt_texts() if self.tokens is None else self.tokens


class ExportRequest(RequestModel):
    """A version as a file."""

    version: Version = "head"
    format: Literal["peft", "safetensors", "edits"] = Field(
        "peft",
        description="`peft`: a LoRA adapter for the PEFT library; `safetensors`: the edited weights; `edits`: an edit set, with "
        "everything that the ledger stores about the active edits, for `POST /import` of another service",
    )
    solve_gated: bool = Field(
        False,
        description="solve gated edits into the weights of a `peft` or `safetensors` file, which differ from what the service serves; the "
        "manifest has the measured difference",
    )

    @model_validator(mode="after")
    def _check_solves_into_weights(self) -> ExportRequest:
        if self.solve_gated and self.format == "edits":
            raise ValueError("an edit set holds gated edits as they are: leave out `solve_gated`")
        return self


class WorkerExportRequest(ExportRequest):
    """An export as a worker receives it: with the number of the version, in a format that a worker writes."""

    version: int = Field(ge=0)
    format: Literal["peft", "safetensors"]


class CompareRequest(ContinuedText):
    """One prompt on two versions."""

    versions: tuple[Version, Version] = ("base", "head")
    top: int = Field(10, ge=1, le=100, description="number of next tokens to compare")


class WorkerCompareRequest(CompareRequest):
    """A comparison as a worker receives it: a conversation is the tokens of its rendered text."""

    tokens: TokenIds | None = None
    text: str = Field("", description="the text of `tokens`")
    end_token_ids: EndTokenIds = Field(default_factory=list)
