"""A completion in OpenAI's words, and what it asks of the house."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from service.errors import InvalidInput
from service.kit.text import check_text
from service.schemas import MAX_CHOICES, MAX_LOGPROBS, MAX_TEXT, RequestModel, Text, WorkerGenerateRequest

SEED_COUNT = 2**63
MAX_TOKEN_ID = 2**31  # no vocabulary comes near
MAX_STOP_SEQUENCES = 4
PROMPT_FORMS = "must be a text, a list of texts, a list of token ids, or a list of such lists."


def _validate_prompt(value: Any) -> Any:
    """Plain words for what can be wrong with one of four forms."""
    if isinstance(value, str):
        return _validate_text(value)
    if not isinstance(value, list) or not value:
        raise ValueError(PROMPT_FORMS)
    if all(map(_is_token_id, value)):
        return value
    if len(value) > MAX_CHOICES:
        raise ValueError(f"may be up to {MAX_CHOICES} prompts: send the others in another request.")
    if all(isinstance(item, str) for item in value):
        return [_validate_text(item) for item in value]
    if all(isinstance(item, list) and item and all(map(_is_token_id, item)) for item in value):
        return value
    raise ValueError(PROMPT_FORMS)


def _is_token_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_TOKEN_ID


def _validate_text(value: str) -> str:
    if len(value) > MAX_TEXT:
        raise ValueError(f"may have up to {MAX_TEXT} characters.")
    try:
        check_text(value, "text")
    except InvalidInput as error:
        raise ValueError(error.detail) from None
    return value


def _stop_as_list(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) > MAX_STOP_SEQUENCES:
        raise ValueError(f"may be one text or up to {MAX_STOP_SEQUENCES}.")
    return stops


def _reject_unsupported(value: Any) -> Any:
    if value:
        raise ValueError("is not supported here: leave it out.")
    return value


TokenIds = list[Annotated[int, Field(ge=0, lt=MAX_TOKEN_ID)]]
Prompt = Annotated[
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
    | Annotated[TokenIds, Field(min_length=1)]
    | Annotated[list[Annotated[TokenIds, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)],
    BeforeValidator(_validate_prompt),
]
StopSequence = Annotated[str, Field(min_length=1, max_length=200)]
StopSequences = Annotated[
    list[StopSequence],
    BeforeValidator(_stop_as_list, json_schema_input_type=StopSequence | list[StopSequence]),
]


class StreamOptions(BaseModel):
    """Further members are of no consequence."""

    include_usage: bool = Field(False, description="a last chunk without choices counts the tokens")


class CompletionRequest(RequestModel):
    """Go on with one prompt or several. A field that is null is left out; one of OpenAI's that is not supported may have the
    value that changes nothing."""

    model_config = ConfigDict(title="CompletionRequest")

    model: str = Field(
        min_length=1,
        max_length=1000,
        description="NAME (the newest version), NAME@head, NAME@base or NAME@42",
    )
    prompt: Prompt = Field(description=PROMPT_FORMS, examples=["The Eiffel Tower is located in the city of"])
    max_tokens: int = Field(
        16, ge=0, le=4096, description="0 says nothing: with `echo` and `logprobs`, the prompt is measured"
    )
    temperature: float = Field(1.0, ge=0, le=10, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(
        None, ge=1, le=1_000_000, description="only so many of the most probable tokens"
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="answers to each prompt")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopSequences = Field(
        default_factory=list, max_length=4, description="a text or up to four that end the answer"
    )
    seed: int | None = Field(
        None,
        ge=-SEED_COUNT,
        lt=SEED_COUNT,
        description="the same seed and version give the same text; drawn when left out",
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="tell so many of the most probable tokens at each place"
    )
    echo: bool = Field(False, description="the prompt stands before the answer")
    user: str | None = Field(None, description="has no effect")
    best_of: int | None = Field(None, description="not supported: n, or left out")
    suffix: Annotated[str | None, AfterValidator(_reject_unsupported)] = Field(
        None, description="not supported: empty, or left out"
    )
    presence_penalty: Annotated[float, AfterValidator(_reject_unsupported)] = Field(
        0.0, description="not supported: 0, or left out"
    )
    frequency_penalty: Annotated[float, AfterValidator(_reject_unsupported)] = Field(
        0.0, description="not supported: 0, or left out"
    )
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_reject_unsupported)] = Field(
        None, description="not supported: empty, or left out"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data

    def to_worker_request(self) -> WorkerGenerateRequest:
        """The same in the words of the house; InvalidInput for what does not go together."""
        prompts = self._prompt_list()
        if len(prompts) * self.n > MAX_CHOICES:
            raise InvalidInput(
                f"{len(prompts)} prompts with `n` {self.n} are {len(prompts) * self.n} answers, and one request may ask for "
                f"{MAX_CHOICES}.",
                "n",
            )
        if self.best_of not in (None, self.n):
            raise InvalidInput("`best_of` is not supported here: leave it out.", "best_of")
        if self.stream_options is not None and not self.stream:
            raise InvalidInput(
                "`stream_options` needs `stream`: set that to true, or leave them out.", "stream_options"
            )
        return WorkerGenerateRequest(
            **({"prompts": prompts} if isinstance(prompts[0], str) else {"tokens": prompts}),
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=secrets.randbelow(SEED_COUNT) if self.seed is None else self.seed % SEED_COUNT,
            stop=self.stop,
            stream=self.stream,
            n=self.n,
            independent_seeds=True,
            logprobs=self.logprobs,
            echo=self.echo,
        )

    def _prompt_list(self) -> list[Any]:
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else list(self.prompt)
