"""Averages of traces by token role: service.studies.trace_averages."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import InvalidInput
from service.studies.trace_averages import TOKEN_ROWS, average_traces, token_positions

FIRST, MIDDLE, LAST_SUBJECT, NEXT, FURTHER, LAST = TOKEN_ROWS


def trace(subject: tuple[int, int], scores: list[list[float]], low: float = 0.1, high: float = 0.9) -> Any:
    """Return a trace of one kind. Severed paths are the scores at the subject's last token, halved for the MLP."""
    row = scores[subject[1] - 1]
    cut = [low + (s - low) / 2 for s in row]
    return {
        "tokens": ["x"] * len(scores),
        "subject": {"text": "x", "tokens": list(subject)},
        "high": high,
        "low": low,
        "kinds": {"mlp": {"scores": scores}},
        "severed": {"token": subject[1] - 1, "scores": {"none": row, "mlp": cut, "attn": row}},
    }


@pytest.mark.parametrize(
    ("subject", "length", "expected"),
    [
        ((1, 5), 9, [[1], [2, 3], [4], [5], [6, 7], [8]]),
        ((0, 1), 4, [[0], [], [0], [1], [2], [3]]),  # a one-token subject: first and last token
        ((0, 2), 3, [[0], [], [1], [2], [], [2]]),  # the following token ends the prompt
        ((1, 3), 3, [[1], [], [2], [], [], [2]]),  # the subject ends the prompt
    ],
)
def test_token_positions(subject: tuple[int, int], length: int, expected: list[list[int]]) -> None:
    """The rows of the paper's figure have the expected tokens."""
    assert [list(r) for r in token_positions(subject, length).values()] == expected


def test_averages_by_hand() -> None:
    """Middle tokens are pooled over prompts, and each prompt is measured from its own low."""
    one = trace((0, 4), [[0.2, 0.1], [0.3, 0.1], [0.5, 0.1], [0.7, 0.3], [0.1, 0.9]], low=0.1)
    two = trace((0, 3), [[0.3, 0.2], [0.8, 0.2], [0.4, 0.2], [0.2, 0.6]], low=0.2, high=0.6)
    study = average_traces([one, two], rounds=50)
    assert study["total_effect"]["mean"] == pytest.approx((0.8 + 0.4) / 2)
    rows = study["kinds"]["mlp"]
    assert rows[MIDDLE]["mean"] == pytest.approx([(0.2 + 0.4 + 0.6) / 3, 0.0])
    assert (rows[MIDDLE]["n"], rows[MIDDLE]["tokens"]) == (2, 3)
    assert rows[LAST_SUBJECT]["mean"] == pytest.approx([(0.6 + 0.2) / 2, (0.2 + 0.0) / 2])
    assert rows[LAST]["mean"] == pytest.approx([0.0, (0.8 + 0.4) / 2])
    assert rows[NEXT]["mean"] == rows[LAST]["mean"]  # both prompts end right after their subjects
    assert rows[FURTHER] == {"mean": None, "low": None, "high": None, "n": 0, "tokens": 0, "peak": None}
    assert rows[LAST]["peak"] | {"low": 0, "high": 0} == {
        "layer": 1, "mean": pytest.approx(0.6), "low": 0, "high": 0, "layers": [1, 1],
    }  # fmt: skip
    assert study["coinciding_rows"] == {
        "first and last subject token": 0,
        "first subsequent and last token": 2,
        "last subject and last token": 0,
    }


def test_severed_losses_are_paired() -> None:
    """The loss of two prompts with very different effects is the mean of the losses of each."""
    traces = [trace((0, 1), [[0.1 + e], [0.1]]) for e in (0.6, 0.2)]
    found = average_traces(traces, rounds=200)["severed"]
    assert found["paths"]["none"]["mean"] == pytest.approx([0.4])
    assert found["lost"]["mlp"]["mean"] == pytest.approx([0.2])
    assert (found["lost"]["mlp"]["low"], found["lost"]["mlp"]["high"]) == (
        pytest.approx([0.1]), pytest.approx([0.3]),
    )  # fmt: skip
    assert found["lost"]["attn"] == {"mean": [0.0], "low": [0.0], "high": [0.0], "n": 2}


def test_single_trace_has_no_interval() -> None:
    """The average of a single trace has no interval."""
    rows = average_traces([trace((0, 2), [[0.2], [0.4], [0.3]])])["kinds"]["mlp"]
    assert rows[FIRST]["mean"] == pytest.approx([0.1]) and rows[FIRST]["low"] is None
    assert rows[FIRST]["peak"]["layers"] is None


def test_no_trace_is_refused() -> None:
    """Averaging no trace raises InvalidInput."""
    with pytest.raises(InvalidInput, match="none of the facts"):
        average_traces([])
