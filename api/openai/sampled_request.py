"""What the bodies of POST /v1/completions and POST /v1/chat/completions have in common."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from service.errors import InvalidInput
from service.schemas import MAX_CHOICES, RequestModel

SEED_COUNT = 2**63
MAX_STOP_SEQUENCES = 4


def _stop_as_list(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and len(stops) > MAX_STOP_SEQUENCES:
        raise ValueError(f"may be one string or up to {MAX_STOP_SEQUENCES}.")
    return stops


def reject_unsupported(value: Any) -> Any:
    if value:
        raise ValueError("is not supported: omit it.")
    return value


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


class SampledRequest(RequestModel):
    """The model, and how an answer is sampled and sent. A null field is the same as an omitted one. Fields of OpenAI's
    API that are not supported accept only the value that has no effect."""

    model: str = Field(
        min_length=1,
        max_length=1000,
        description="NAME (the newest version), NAME@head, NAME@base or NAME@42",
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
    user: str | None = Field(None, max_length=1000, description="has no effect")
    presence_penalty: Annotated[float, AfterValidator(reject_unsupported)] = Field(
        0.0, description="not supported: must be 0"
    )
    frequency_penalty: Annotated[float, AfterValidator(reject_unsupported)] = Field(
        0.0, description="not supported: must be 0"
    )
    logit_bias: Annotated[dict[str, float] | None, AfterValidator(reject_unsupported)] = Field(
        None, max_length=1000, description="not supported: must be empty"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, Mapping) else data

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_fields(self) -> dict[str, Any]:
        """Return the fields of the worker request that both bodies have. Raises InvalidInput if they contradict each
        other."""
        if self.stream_options is not None and not self.stream:
            raise InvalidInput(
                "`stream_options` requires `stream`: set it to true, or omit them.", "stream_options"
            )
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": secrets.randbelow(SEED_COUNT) if self.seed is None else self.seed % SEED_COUNT,
            "stop": self.stop,
            "stream": self.stream,
            "n": self.n,
            "independent_seeds": True,
        }
