"""Tests of the costs of work."""

from __future__ import annotations

import pytest

from service.application.costs import generation_tokens, job_cost, new_tokens
from service.schemas import MAX_RECORDS, CompareRequest, GenerateRequest, WorkerGenerateRequest


@pytest.mark.parametrize(
    ("request_", "tokens", "new"),
    [
        (GenerateRequest(prompt="x" * 40, max_new_tokens=7), 17, 7),
        (GenerateRequest(prompts=["x" * 40, "y"], max_new_tokens=7), 10 + 1 + 14, 14),
        (GenerateRequest(prompt="é" * 4, max_new_tokens=1), 3, 1),
        (WorkerGenerateRequest(prompts=["x" * 8, "y"], n=3, max_new_tokens=5), 3 * (2 + 1) + 30, 30),
        (WorkerGenerateRequest(tokens=[[1, 2, 3]], n=2, max_new_tokens=0), 6, 0),
        (CompareRequest(prompt="x" * 8, max_new_tokens=5), 2 * (2 + 5), 10),
    ],
)
def test_tokens_of_a_request(request_: GenerateRequest | CompareRequest, tokens: int, new: int) -> None:
    """A request needs the tokens of each prompt and the new tokens of each generation."""
    assert (generation_tokens(request_), new_tokens(request_)) == (tokens, new)


@pytest.mark.parametrize(
    ("kind", "request_", "cost"),
    [
        ("edit", {"subject": "x"}, 1),
        ("trace", {"samples": 30}, 30),
        ("export", {}, 1),
        ("evaluation", {"records": 70, "limit": None}, 70),
        ("evaluation", {"records": 70, "limit": 20}, 20),
        ("evaluation", {"records": None, "limit": None}, MAX_RECORDS),
        ("evaluation", {"records": None, "limit": 20}, 20),
    ],
)
def test_cost_of_a_job(kind: str, request_: dict[str, int | None], cost: float) -> None:
    """The cost of a job grows with the work that its request asks for."""
    assert job_cost(kind, request_) == cost


def test_generations_end_at_the_positions_of_the_model() -> None:
    """A generation needs no more new tokens than the model has positions, whatever it asks for."""
    request = GenerateRequest(prompts=["x" * 40] * 3, max_new_tokens=4096)
    assert new_tokens(request, positions=64) == 3 * 64
    assert generation_tokens(request, positions=64) == 3 * (10 + 64)
    assert new_tokens(request, positions=8192) == 3 * 4096
