"""Request models: service.schemas."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.errors import InvalidInput
from service.kit.text import Statement
from service.schemas import (
    CompareRequest,
    EditListRequest,
    EditRequest,
    EvaluationPlan,
    EvaluationRequest,
    GenerateRequest,
    Guard,
    TraceRequest,
)

EDIT = {"subject": "Eiffel Tower", "prompt": "The {} is located in the city of", "target_new": "Rome"}


def test_an_edit_needs_three_things() -> None:
    """Subject, prompt and new object are enough; everything else has a default, and the guard is on."""
    edit = EditRequest.model_validate(EDIT)
    assert edit.statement.text == "The Eiffel Tower is located in the city of"
    assert edit.guard == Guard() and edit.guard.enabled
    assert not edit.dry_run


@pytest.mark.parametrize(
    "change",
    [
        {"subject": " "},
        {"target_new": ""},
        {"prompt": "a\x00{}"},
        {"method": "mend"},
        {"colour": "red"},
        {"probes": {"neighborhood": [{"prompt": "Rome"}]}},
        {"guard": {"max_perplexity": 0.5}},
        {"guard": {"max_perplexity": float("nan")}},
        {"guard": {"max_norm": 0}},
        {"guard": {"max_broken": -1}},
        {"subject": "x" * 501},
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    """Unknown fields, empty texts and invalid limits are rejected."""
    with pytest.raises(ValidationError):
        EditRequest.model_validate(EDIT | change)


@pytest.mark.parametrize(
    ("probes", "paraphrases", "neighbors"),
    [
        ("auto", None, None),
        ({}, [], []),
        ({"paraphrase": ["{} in"]}, ["{} in"], []),
        ({"paraphrase": ["{} in"], "neighborhood": "auto"}, ["{} in"], None),
        ({"paraphrase": "auto", "neighborhood": []}, None, []),
    ],
)
def test_probes_are_given_or_found(
    probes: Any, paraphrases: list[str] | None, neighbors: list[Any] | None
) -> None:
    """Either kind of probes is a list, which may be empty, or "auto"; a stored request says the same again."""
    edit = EditRequest.model_validate(EDIT | {"probes": probes})
    assert (edit.given_paraphrases, edit.given_neighbors) == (paraphrases, neighbors)
    assert EditRequest.model_validate(edit.model_dump(mode="json")) == edit
    assert EditRequest.model_validate(EDIT).probes == "auto"


@pytest.mark.parametrize(
    ("probes", "path"),
    [
        ("none", ("probes",)),
        ({"paraphrase": "all"}, ("probes", "paraphrase")),
        ({"neighborhood": [{"prompt": "a"}]}, ("probes", "neighborhood", 0, "target")),
        ({"paraphrase": ["a"] * 65}, ("probes", "paraphrase")),
        ({"neighborhood": [{"prompt": "a", "target": "b"}] * 65}, ("probes", "neighborhood")),
    ],
)
def test_an_error_in_probes_names_one_field(probes: Any, path: tuple[str | int, ...]) -> None:
    """Another word than "auto", an incomplete probe and too long a list are one error each, at their field."""
    with pytest.raises(ValidationError) as error:
        EditRequest.model_validate(EDIT | {"probes": probes})
    assert [e["loc"] for e in error.value.errors()] == [path]


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "write", "target_new": None},
        {"objective": "erase", "target_new": "Rome", "target_true": "Paris"},
        {"objective": "erase", "target_new": "Paris", "target_true": "Paris"},
        {"objective": "amplify", "target_new": "Rome"},
    ],
)
def test_objects_are_those_of_the_objective(change: dict[str, Any]) -> None:
    """The objective write requires target_new; erase and amplify reject it. The error names the field."""
    with pytest.raises(ValidationError) as error:
        EditRequest.model_validate(EDIT | change)
    assert [e["loc"] for e in error.value.errors()] == [("target_new",)]


def test_target_true_is_optional_for_erase_and_amplify() -> None:
    """An erasure or an amplification needs no object; an amplification may name the true one twice."""
    for change in ({"objective": "erase"}, {"objective": "amplify"}):
        assert EditRequest.model_validate(EDIT | change | {"target_new": None}).target_object is None
    twice = {"objective": "amplify", "target_new": "Paris", "target_true": "Paris"}
    assert EditRequest.model_validate(EDIT | twice).target_object == "Paris"


def test_many_edits_are_at_least_one() -> None:
    """An empty list of edits is rejected."""
    with pytest.raises(ValidationError):
        EditListRequest(edits=[])


def test_a_trace_finds_its_subject_with_a_slot_or_without() -> None:
    """The subject is located in a plain prompt and in a prompt with a placeholder."""
    plain = TraceRequest(prompt="The Eiffel Tower is in", subject="Eiffel Tower").statement
    assert plain == TraceRequest(prompt="The {} is in", subject="Eiffel Tower").statement
    assert plain == Statement("The Eiffel Tower is in", (4, 16))


def test_plan_of_an_evaluation_request() -> None:
    """The plan of an evaluation has the fields of the request without the records, and defaults."""
    request = EvaluationRequest(records=[EDIT], method="memit", limit=1)
    assert request.plan() == EvaluationPlan(method="memit")


def test_a_generation_has_one_prompt_or_several() -> None:
    """A request has either `prompt` or `prompts`; both or neither raise InvalidInput."""
    assert GenerateRequest(prompt="a").prompt_texts() == ["a"]
    assert GenerateRequest(prompts=["a", "b"]).prompt_texts() == ["a", "b"]
    for wrong in (GenerateRequest(), GenerateRequest(prompt="a", prompts=["b"])):
        with pytest.raises(InvalidInput, match="either"):
            wrong.prompt_texts()


@pytest.mark.parametrize("version", ["", "x" * 301, "a\0", -0.5, None, [1]])
def test_a_version_is_a_number_or_a_name(version: object) -> None:
    """A version that is no number and cannot be a name is rejected."""
    with pytest.raises(ValidationError):
        CompareRequest.model_validate({"prompt": "a", "versions": ["base", version]})


def test_form_and_its_hyperparameter_agree() -> None:
    """The form is given as a field or as a hyperparameter; two different forms are refused."""
    edit = {"subject": "Louvre", "prompt": "The {} is in", "target_new": "Rome"}
    by_field = EditRequest.model_validate(edit | {"form": "gated", "hparams": {"steps": 3}})
    assert by_field.hparam_overrides == {"steps": 3, "form": "gated"}
    with pytest.raises(ValidationError, match="`form` and the hyperparameter `form` differ"):
        EditRequest.model_validate(edit | {"form": "gated", "hparams": {"form": "weights"}})
