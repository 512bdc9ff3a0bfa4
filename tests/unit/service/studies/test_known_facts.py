"""The facts that a model knows: service.studies.known_facts."""

from __future__ import annotations

import torch

from service.kit.steps import run_to_completion
from service.models.loading import LoadedModel
from service.studies.facts import Fact
from service.studies.known_facts import find_known_facts
from tests.support.tiny_models import tiny


def next_word(model: LoadedModel, text: str) -> str | None:
    """Return the most probable token after a text, if the tokenizer splits both together into the same tokens."""
    ids, _ = model.encode(text)
    with torch.no_grad():
        token = int(model.model(torch.tensor([ids])).logits[0, -1].argmax())
    word = model.decode([token])
    return word if word.strip() and model.encode(text + word)[0] == [*ids, token] else None


def test_known_facts_are_the_greedy_answers() -> None:
    """A fact is known if its object is the greedy answer. A fact that exceeds the context length is not scored."""
    model, prompt = tiny(), "{} is ("  # no space comes after a bracket
    subject = next(
        x for x in ("Big Ben", "Rome", "Japan", "Paris", "Brazil") if next_word(model, f"{x} is (")
    )
    word = next_word(model, f"{subject} is (") or ""
    other = "in" if word != "in" else "of"
    facts = [Fact(subject, prompt, other), Fact(subject, prompt, word), Fact("x" * 200, prompt, "Rome")]
    known_facts = run_to_completion(find_known_facts(model, facts))
    assert known_facts.indices == [1]
    assert known_facts.left_out() == {"unknown": 1, "unscorable": 1}
