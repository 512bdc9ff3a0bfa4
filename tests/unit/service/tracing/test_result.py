"""Tests of service.tracing.result."""

from __future__ import annotations

import json

import pytest

from service.kit.steps import run_to_completion
from service.kit.text import locate_subject
from service.tracing.fast_trace import trace_statement
from tests.support.tiny_models import tiny


def test_as_json() -> None:
    """The JSON has scores and effects of each kind and the subject's tokens, and is valid JSON."""
    steps = trace_statement(
        tiny(), locate_subject("In Rome it is in", "Rome"), "Paris", samples=2, severed=True
    )
    result = run_to_completion(steps)
    payload = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert payload == result.to_json()
    b, e = payload["subject"]["tokens"]
    assert "".join(payload["tokens"][b:e]).strip() == payload["subject"]["text"] == "Rome"
    assert payload["answer"]["text"] == "Paris" and "".join(payload["answer"]["tokens"]) == " Paris"
    assert payload["total_effect"] == pytest.approx(payload["high"] - payload["low"])
    assert payload["noise"]["level"] == pytest.approx(3 * payload["noise"]["sigma"])
    for kind in ("hidden", "mlp", "attn"):
        grid = payload["kinds"][kind]
        assert len(grid["scores"]) == len(payload["tokens"]) and len(grid["scores"][0]) == 3
        assert grid["indirect_effect"][b][0] == pytest.approx(grid["scores"][b][0] - payload["low"])
        best = grid["best"]
        assert grid["scores"][best["token"]][best["layer"]] == best["score"] == max(map(max, grid["scores"]))
    assert payload["severed"]["token"] == e - 1
    assert set(payload["severed"]["scores"]) == {"none", "mlp", "attn"}
