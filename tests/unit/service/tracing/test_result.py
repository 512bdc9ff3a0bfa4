"""What a trace found."""

from __future__ import annotations

import json

import pytest

from service.kit.steps import finish
from service.kit.text import find
from service.tracing.fast_trace import trace_steps
from tests.support.tiny_models import tiny


def test_as_json() -> None:
    """The JSON has scores and effects of each kind, the subject's tokens, and survives a round trip."""
    steps = trace_steps(tiny(), find("In Rome it is in", "Rome"), "Paris", samples=2, severed=True)
    found = finish(steps)
    shown = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert shown == found.to_json()
    b, e = shown["subject"]["tokens"]
    assert "".join(shown["tokens"][b:e]).strip() == shown["subject"]["text"] == "Rome"
    assert shown["answer"]["text"] == "Paris" and "".join(shown["answer"]["tokens"]) == " Paris"
    assert shown["total_effect"] == pytest.approx(shown["high"] - shown["low"])
    assert shown["noise"]["level"] == pytest.approx(3 * shown["noise"]["sigma"])
    for kind in ("hidden", "mlp", "attn"):
        grid = shown["kinds"][kind]
        assert len(grid["scores"]) == len(shown["tokens"]) and len(grid["scores"][0]) == 3
        assert grid["indirect_effect"][b][0] == pytest.approx(grid["scores"][b][0] - shown["low"])
        best = grid["best"]
        assert grid["scores"][best["token"]][best["layer"]] == best["score"] == max(map(max, grid["scores"]))
    assert shown["severed"]["token"] == e - 1
    assert set(shown["severed"]["scores"]) == {"none", "mlp", "attn"}
