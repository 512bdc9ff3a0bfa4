"""The cost of work: the service that it needs, in a unit of its kind. Quotas and fair queues divide this service.

A cost is known from the request alone, before anything is tokenized or computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.schemas import (
    MAX_RECORDS,
    ChatMessage,
    CompareRequest,
    GenerateRequest,
    WorkerCompareRequest,
    WorkerGenerateRequest,
)

BYTES_PER_TOKEN = 4  # of a prompt, about
#: as long as what a chat template puts around a message, about
MESSAGE_FRAME = "<|im_start|>role<|im_end|>"


def generation_tokens(request: GenerateRequest | CompareRequest, positions: int | None = None) -> int:
    """Return the tokens that a request may need: those of its prompts, estimated, and all new ones.

    A generation ends at the `positions` of the model, where they are known.
    """
    prompts = _prompts_of_generations(request)
    return sum(map(_prompt_tokens, prompts)) + new_tokens(request, positions)


def new_tokens(request: GenerateRequest | CompareRequest, positions: int | None = None) -> int:
    """Return the most new tokens that a request may generate."""
    of_one = request.max_new_tokens if positions is None else min(request.max_new_tokens, positions)
    return len(_prompts_of_generations(request)) * of_one


def _prompts_of_generations(request: GenerateRequest | CompareRequest) -> list[str | list[int]]:
    """Return the prompt of each generation."""
    if isinstance(request, CompareRequest):
        return [_prompt_of_comparison(request)] * len(request.versions)
    if request.messages is not None:
        request.prompt_texts()  # raises if another prompt is given
        count = request.n if isinstance(request, WorkerGenerateRequest) else 1
        return [_conversation_text(request.messages)] * count
    if isinstance(request, WorkerGenerateRequest):
        return list(request.prompts_or_ids()) * request.n
    return list(request.prompt_texts())


def _prompt_of_comparison(request: CompareRequest) -> str | list[int]:
    if isinstance(request, WorkerCompareRequest) and request.tokens is not None:
        return request.tokens
    request.check_form()
    return _conversation_text(request.messages) if request.prompt is None else request.prompt


def _conversation_text(messages: Sequence[ChatMessage] | None) -> str:
    """Return a text with about as many tokens as a conversation in the form of a chat template."""
    return "".join(f"{MESSAGE_FRAME}{message.content}" for message in messages or ())


def _prompt_tokens(prompt: str | Sequence[int]) -> int:
    return -(-len(prompt.encode()) // BYTES_PER_TOKEN) if isinstance(prompt, str) else len(prompt)


def job_cost(kind: str, request: Mapping[str, Any]) -> float:
    """Return the cost of a job in the unit of its kind: records of an evaluation, samples of a trace, else jobs."""
    if kind == "evaluation":
        records = request.get("records") or MAX_RECORDS
        return float(min(records, request.get("limit") or records))
    if kind == "trace":
        return float(request.get("samples") or 1)
    return 1.0
