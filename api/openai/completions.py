"""The request body of POST /v1/completions, and its translation to a worker request."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from service.errors import InvalidInput
from service.kit.text import check_text
from service.schemas import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_TEXT,
    MAX_TOKEN_ID,
    RequestModel,
    Text,
    TokenIds,
    WorkerGenerateRequest,
)

SEED_COUNT = 2**63
MAX_STOP_SEQUENCES = 4
PROMPT_FORMS = "must be a string, a list of strings, a list of token ids, or a list of such lists."


def _validate_prompt(value: Any) -> Any:
    """Validate the four forms of a prompt with one message instead of one per form."""
    if isinstance(value, str):
        return _validate_text(value)
    if not isinstance(value, list) or not value:
        raise ValueError(PROMPT_FORMS)
    if all(map(_is_token_id, value)):
        return value
    if len(value) > MAX_CHOICES:
        raise ValueError(f"may have up to {MAX_CHOICES} prompts: send the others in another request.")
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
        raise ValueError(f"may be one string or up to {MAX_STOP_SEQUENCES}.")
    return stops


def _reject_unsupported(value: Any) -> Any:
    if value:
        raise ValueError("is not supported: omit it.")
    return value


Prompt = Annotated[
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)],
    BeforeValidator(_validate_prompt),
]
StopSequence = Annotated[str, Field(min_length=1, max_length=200)]
StopSequences = Annotated[
    list[StopSequence],
    BeforeValidator(
        _stop_as_list,
        json_schema_input_type=StopSequence
        | Annotated[list[StopSequence], Field(max_length=MAX_STOP_SEQUENCES)],
    ),
]


class StreamOptions(BaseModel):
    """Unknown members are ignored."""

    include_usage: bool = Field(
        False, description="send a last chunk without choices that has the token counts"
    )


class CompletionRequest(RequestModel):
    """Complete one prompt or several. A null field is the same as an omitted one. Fields of OpenAI's API that are not
    supported accept only the value that has no effect."""

    model_config = ConfigDict(title="CompletionRequest")

    model: str = Field(
        min_length=1,
        max_length=1000,
        description="NAME (the newest version), NAME@head, NAME@base or NAME@42",
    )
    prompt: Prompt = Field(description=PROMPT_FORMS, examples=["The Eiffel Tower is located in the city of"])
    max_tokens: int = Field(
        16, ge=0, le=4096, description="0 generates nothing; with `echo` and `logprobs` it scores the prompt"
    )
    temperature: float = Field(1.0, ge=0, le=10, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(
        None, ge=1, le=1_000_000, description="sample from this number of most probable tokens"
    )
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="choices per prompt")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopSequences = Field(
        default_factory=list, max_length=4, description="a string, or up to four, that end the generation"
    )
    seed: int | None = Field(
        None,
        ge=-SEED_COUNT,
        lt=SEED_COUNT,
        description="the same seed and version give the same text; random by default",
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="number of most probable tokens to return at each position"
    )
    echo: bool = Field(False, description="include the prompt in the text")
    user: str | None = Field(None, max_length=1000, description="has no effect")
    best_of: int | None = Field(None, description="not supported: must equal n")
    suffix: Annotated[str | None, AfterValidator(_reject_unsupported)] = Field(
        None, max_length=MAX_TEXT, description="not supported: must be empty"
    )
    presence_penalty: Annotated[float, AfterValidator(_reject_unsupported)] = Field(
        0.0, description="not supported: must be 0"
    )
    frequency_penalty: Annotated[float, AfterValidator(_reject_unsupported)] = Field(
        0.0, description="not supported: must be 0"
    )
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_reject_unsupported)] = Field(
        None, max_length=1000, description="not supported: must be empty"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data

    def to_worker_request(self) -> WorkerGenerateRequest:
        """Return the worker request. Raises InvalidInput if fields contradict each other."""
        prompts = self._prompt_list()
        if len(prompts) * self.n > MAX_CHOICES:
            raise InvalidInput(
                f"{len(prompts)} prompts with `n` {self.n} are {len(prompts) * self.n} choices, and the maximum is {MAX_CHOICES}.",
                "n",
            )
        if self.best_of not in (None, self.n):
            raise InvalidInput("`best_of` is not supported: omit it.", "best_of")
        if self.stream_options is not None and not self.stream:
            raise InvalidInput(
                "`stream_options` requires `stream`: set it to true, or omit them.", "stream_options"
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
