"""Tests of service.models.separator_choice."""

from __future__ import annotations

import math

import pytest

from service.kit.separator import SEPARATORS, Separator
from service.kit.steps import run_to_completion
from service.models.scoring import score_targets
from service.models.separator_choice import choose_separator
from tests.support.tiny_models import tiny


def joint_probability(prompt: str, text: str) -> float:
    """Return the probability of a text after a prompt, as the product over its tokens."""
    (score,) = run_to_completion(score_targets(tiny(), [(prompt, text)], separators=[""]))
    return math.exp(score.log_p * score.num_tokens)


@pytest.mark.parametrize("objects", [["45"], ["45", "7"]])
def test_the_model_chooses_the_more_probable_spelling(
    objects: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both spellings are possible, the choice is the one with which the objects are more probable; it follows
    the model when its preference is reversed."""
    prompt = "It costs $"
    total = {s: sum(joint_probability(prompt, s + name) for name in objects) for s in SEPARATORS}
    chosen = run_to_completion(choose_separator(tiny(), prompt, objects))
    assert chosen == max(SEPARATORS, key=lambda s: total[s])

    def reversed_scores(model, pairs, phase, separators):  # type: ignore[no-untyped-def]
        scores = yield from score_targets(model, pairs, phase, separators)
        return [s._replace(log_p=-1 / s.log_p, num_tokens=1) for s in scores]

    monkeypatch.setattr("service.models.separator_choice.score_targets", reversed_scores)
    if len(objects) == 1:
        assert run_to_completion(choose_separator(tiny(), prompt, objects)) != chosen


@pytest.mark.parametrize(
    ("prompt", "given", "expected"),
    [("The city of", None, " "), ("It costs $", " ", " "), ("It costs $", "", ""), ("The city of", "", "")],
)
def test_no_pass_where_nothing_is_to_choose(prompt: str, given: Separator | None, expected: str) -> None:
    """A certain separator and one that the request names are used without a pass of the model."""
    steps = choose_separator(tiny(), prompt, ["45"], given)
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == expected
