"""The request body of POST /v1/completions, and its translation to a worker request."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from api.openai.sampled_request import SampledRequest, reject_unsupported
from service.errors import InvalidInput
from service.kit.text import check_text
from service.schemas import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_TEXT,
    MAX_TOKEN_ID,
    Text,
    TokenIds,
    WorkerGenerateRequest,
)

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


Prompt = Annotated[
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)],
    BeforeValidator(_validate_prompt),
]


class CompletionRequest(SampledRequest):
    """Complete one prompt or several. A null field is the same as an omitted one. Fields of OpenAI's API that are not
    supported accept only the value that has no effect."""

    model_config = ConfigDict(title="CompletionRequest")

    prompt: Prompt = Field(description=PROMPT_FORMS, examples=["The Eiffel Tower is located in the city of"])
    max_tokens: int = Field(
        16, ge=0, le=4096, description="0 generates nothing; with `echo` and `logprobs` it scores the prompt"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="number of most probable tokens to return at each position"
    )
    echo: bool = Field(False, description="include the prompt in the text")
    best_of: int | None = Field(None, description="not supported: must equal n")
    suffix: Annotated[str | None, AfterValidator(reject_unsupported)] = Field(
        None, max_length=MAX_TEXT, description="not supported: must be empty"
    )

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
        return WorkerGenerateRequest(
            **({"prompts": prompts} if isinstance(prompts[0], str) else {"tokens": prompts}),
            max_new_tokens=self.max_tokens,
            logprobs=self.logprobs,
            echo=self.echo,
            **self.sampling_fields(),
        )

    def _prompt_list(self) -> list[Any]:
        is_single = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if is_single else list(self.prompt)
