"""The request body of POST /v1/chat/completions, and its translation to a worker request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from api.openai.sampled_request import SampledRequest, reject_unsupported
from service.errors import InvalidInput
from service.schemas import (
    MAX_CHAT_LOGPROBS,
    MAX_MESSAGES,
    ChatMessage,
    Content,
    RequestModel,
    WorkerGenerateRequest,
)

DEFAULT_MAX_TOKENS = 512  #: of each choice


def _reject_or_drop(value: Any) -> None:
    reject_unsupported(value)


#: a field of OpenAI's API that is not supported
Unsupported = Annotated[
    None,
    BeforeValidator(_reject_or_drop, json_schema_input_type=None),
    Field(description="not supported: must be empty"),
]


class OpenAiMessage(RequestModel):
    """A message of a conversation. An answer of this service can be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="`developer` means `system`"
    )
    content: Content
    name: Annotated[str, Field(max_length=1000)] | None = Field(None, description="has no effect")
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _reject_other_roles(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("role") in ("tool", "function"):
            raise ValueError("is a result of a tool, and tools are not supported: leave it out.")
        return data

    def to_message(self) -> ChatMessage:
        """Return the message in the service's own form."""
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=self.content)


class ResponseFormat(RequestModel):
    """The form of the answer."""

    type: Literal["text"]


class ChatCompletionRequest(SampledRequest):
    """Answer a conversation. A null field is the same as an omitted one. Fields of OpenAI's API that are not supported
    accept only the value that has no effect."""

    model_config = ConfigDict(title="ChatCompletionRequest")

    messages: Annotated[list[OpenAiMessage], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="the conversation, in the order of its messages",
        examples=[[{"role": "user", "content": "Where is the Eiffel Tower?"}]],
    )
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        le=4096,
        description=f"most tokens of each choice; default: {DEFAULT_MAX_TOKENS}, or fewer if `n` choices would exceed the "
        "limit of the service",
    )
    max_tokens: int | None = Field(None, ge=1, le=4096, description="older name of `max_completion_tokens`")
    logprobs: bool = Field(False, description="return the log probabilities of the tokens of the answer")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_CHAT_LOGPROBS,
        description="number of most probable tokens to return at each position; needs `logprobs`",
    )
    continue_final_message: bool = Field(
        False, description="continue the last message, which is one of the assistant, in place of a new one"
    )
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tool_choice: Literal["none", "auto"] | None = Field(None, description="has no effect")
    parallel_tool_calls: bool | None = Field(None, description="has no effect")
    service_tier: Literal["auto", "default"] | None = Field(None, description="has no effect")
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = Field(
        None, description="has no effect"
    )
    prompt_cache_key: Annotated[str, Field(max_length=1000)] | None = Field(None, description="has no effect")
    tools: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    metadata: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    store: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    @property
    def length_field(self) -> str:
        """The name under which the number of new tokens was given."""
        return "max_tokens" if self.max_tokens is not None else "max_completion_tokens"

    def to_worker_request(self, max_new_tokens: int) -> WorkerGenerateRequest:
        """Return the worker request; the service allows `max_new_tokens` over all choices.

        Raises InvalidInput if fields contradict each other.
        """
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidInput(
                "`max_tokens` is the older name of `max_completion_tokens`: give one of them.", "max_tokens"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidInput(
                "`top_logprobs` requires `logprobs`: set it to true, or omit them.", "top_logprobs"
            )
        given = self.max_tokens or self.max_completion_tokens
        return WorkerGenerateRequest(
            messages=[message.to_message() for message in self.messages],
            continue_final_message=self.continue_final_message,
            max_new_tokens=given or max(1, min(DEFAULT_MAX_TOKENS, max_new_tokens // self.n)),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **self.sampling_fields(),
        )
