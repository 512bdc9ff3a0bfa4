"""The cost of work: the service that it needs, in a unit of its kind. Quotas and fair queues divide this service.

A cost is known from the request alone, before anything is tokenized or computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.schemas import MAX_RECORDS, CompareRequest, GenerateRequest, WorkerGenerateRequest

BYTES_PER_TOKEN = 4  # of a prompt, about


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
        return [request.prompt] * len(request.versions)
    if isinstance(request, WorkerGenerateRequest):
        return list(request.prompts_or_ids()) * request.n
    return list(request.prompt_texts())


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
