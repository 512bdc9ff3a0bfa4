"""Which facts a model knows: service.studies.known_facts."""

from __future__ import annotations

import torch

from service.kit.steps import run_to_completion
from service.models.loading import LoadedModel
from service.studies.facts import Fact
from service.studies.known_facts import find_known_facts, run_artifact_name
from tests.support.tiny_models import tiny


def next_word(model: LoadedModel, text: str) -> str | None:
    """The most probable token after a text, if text and token are read as just that."""
    ids, _ = model.encode(text)
    with torch.no_grad():
        token = int(model.model(torch.tensor([ids])).logits[0, -1].argmax())
    word = model.decode([token])
    return word if word.strip() and model.encode(text + word)[0] == [*ids, token] else None


def test_known_facts_are_the_greedy_answers() -> None:
    """What is known is what is said; another object is not, and a fact longer than the model's positions is not asked."""
    model, prompt = tiny(), "{} is ("  # no space comes after a bracket
    subject = next(
        x for x in ("Big Ben", "Rome", "Japan", "Paris", "Brazil") if next_word(model, f"{x} is (")
    )
    word = next_word(model, f"{subject} is (") or ""
    other = "in" if word != "in" else "of"
    facts = [Fact(subject, prompt, other), Fact(subject, prompt, word), Fact("x" * 200, prompt, "Rome")]
    known_facts = run_to_completion(find_known_facts(model, facts))
    assert known_facts.indices == [1]
    assert known_facts.left_out() == {"not known to the model": 1, "cannot be asked": 1}


def test_run_artifact_name_depends_on_all_inputs() -> None:
    """Another setting has another name; the order of an object's fields is no setting."""
    assert run_artifact_name("trace", {"a": 1, "b": 2}) == run_artifact_name("trace", {"b": 2, "a": 1})
    assert (
        run_artifact_name("trace", {"a": 1})
        != run_artifact_name("trace", {"a": 2})
        != run_artifact_name("edit", {"a": 2})
    )
