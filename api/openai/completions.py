"""A completion in OpenAI's words, and what it asks of the house."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from service.errors import InvalidInput
from service.kit.text import check_text
from service.schemas import MAX_ANSWERS, MAX_LOGPROBS, MAX_TEXT, Asked, SpeechRequest, Text

SEEDS = 2**63
MAX_ID = 2**31  # no vocabulary comes near
MAX_STOPS = 4
FORMS = "must be a text, a list of texts, a list of token ids, or a list of such lists."


def _prompt(value: Any) -> Any:
    """Plain words for what can be wrong with one of four forms."""
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list) or not value:
        raise ValueError(FORMS)
    if all(map(_is_id, value)):
        return value
    if len(value) > MAX_ANSWERS:
        raise ValueError(f"may be up to {MAX_ANSWERS} prompts: send the others in another request.")
    if all(isinstance(one, str) for one in value):
        return [_text(one) for one in value]
    if all(isinstance(one, list) and one and all(map(_is_id, one)) for one in value):
        return value
    raise ValueError(FORMS)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_ID


def _text(value: str) -> str:
    if len(value) > MAX_TEXT:
        raise ValueError(f"may have up to {MAX_TEXT} characters.")
    try:
        check_text(value, "text")
    except InvalidInput as error:
        raise ValueError(error.detail) from None
    return value


def _listed(value: Any) -> Any:
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, list) and len(listed) > MAX_STOPS:
        raise ValueError(f"may be one text or up to {MAX_STOPS}.")
    return listed


def _neutral(value: Any) -> Any:
    if value:
        raise ValueError("is not supported here: leave it out.")
    return value


Ids = list[Annotated[int, Field(ge=0, lt=MAX_ID)]]
Prompt = Annotated[
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_ANSWERS)]
    | Annotated[Ids, Field(min_length=1)]
    | Annotated[list[Annotated[Ids, Field(min_length=1)]], Field(min_length=1, max_length=MAX_ANSWERS)],
    BeforeValidator(_prompt),
]
StopText = Annotated[str, Field(min_length=1, max_length=200)]
Stop = Annotated[list[StopText], BeforeValidator(_listed, json_schema_input_type=StopText | list[StopText])]


class StreamOptions(BaseModel):
    """Further members are of no consequence."""

    include_usage: bool = Field(False, description="a last chunk without choices counts the tokens")


class CompletionRequest(Asked):
    """Go on with one prompt or several. A field that is null is left out; one of OpenAI's that is not supported may have the
    value that changes nothing."""

    model_config = ConfigDict(title="CompletionRequest")

    model: str = Field(
        min_length=1,
        max_length=1000,
        description="NAME (the newest version), NAME@head, NAME@base or NAME@42",
    )
    prompt: Prompt = Field(description=FORMS, examples=["The Eiffel Tower is located in the city of"])
    max_tokens: int = Field(
        16, ge=0, le=4096, description="0 says nothing: with `echo` and `logprobs`, the prompt is measured"
    )
    temperature: float = Field(1.0, ge=0, le=10, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(
        None, ge=1, le=1_000_000, description="only so many of the most probable tokens"
    )
    n: int = Field(1, ge=1, le=MAX_ANSWERS, description="answers to each prompt")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop = Field(
        default_factory=list, max_length=4, description="a text or up to four that end the answer"
    )
    seed: int | None = Field(
        None,
        ge=-SEEDS,
        lt=SEEDS,
        description="the same seed and version give the same text; drawn when left out",
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="tell so many of the most probable tokens at each place"
    )
    echo: bool = Field(False, description="the prompt stands before the answer")
    user: str | None = Field(None, description="has no effect")
    best_of: int | None = Field(None, description="not supported: n, or left out")
    suffix: Annotated[str | None, AfterValidator(_neutral)] = Field(
        None, description="not supported: empty, or left out"
    )
    presence_penalty: Annotated[float, AfterValidator(_neutral)] = Field(
        0.0, description="not supported: 0, or left out"
    )
    frequency_penalty: Annotated[float, AfterValidator(_neutral)] = Field(
        0.0, description="not supported: 0, or left out"
    )
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(_neutral)] = Field(
        None, description="not supported: empty, or left out"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data

    def speech(self) -> SpeechRequest:
        """The same in the words of the house; InvalidInput for what does not go together."""
        prompts = self._prompts()
        if len(prompts) * self.n > MAX_ANSWERS:
            raise InvalidInput(
                f"{len(prompts)} prompts with `n` {self.n} are {len(prompts) * self.n} answers, and one request may ask for "
                f"{MAX_ANSWERS}.",
                "n",
            )
        if self.best_of not in (None, self.n):
            raise InvalidInput("`best_of` is not supported here: leave it out.", "best_of")
        if self.stream_options is not None and not self.stream:
            raise InvalidInput(
                "`stream_options` needs `stream`: set that to true, or leave them out.", "stream_options"
            )
        return SpeechRequest(
            **({"prompts": prompts} if isinstance(prompts[0], str) else {"tokens": prompts}),
            max_new_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=secrets.randbelow(SEEDS) if self.seed is None else self.seed % SEEDS,
            stop=self.stop,
            stream=self.stream,
            choices=self.n,
            apart=True,
            logprobs=self.logprobs,
            echo=self.echo,
        )

    def _prompts(self) -> list[Any]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)
