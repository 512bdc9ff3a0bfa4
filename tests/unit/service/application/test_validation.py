"""Validation against the shipped model's tokenizer, and against one of a chat model: service.application.validation."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer

from service.application.edit_set import ExportedEdit
from service.application.validation import (
    resolve_methods,
    validate_edit,
    validate_evaluation,
    validate_generation,
    validate_trace,
)
from service.db.models import Model
from service.errors import InvalidInput
from service.kit.text_encoder import TextEncoder
from service.schemas import EditRequest, EvaluationRequest, TraceRequest, WorkerGenerateRequest
from tests.support.paths import ROOT
from tests.support.served_model import INFO
from tests.support.tiny_models import END

TURN = "<|im_end|>"
EXTRA = "<extra>"  # a token for which the embedding has no row
EDIT: dict[str, Any] = {"subject": "Louvre", "prompt": "The {} is in the city of", "target_new": "Rome"}
TRACE: dict[str, Any] = {"subject": "Louvre", "prompt": "The Louvre is in the city of", "target": "Paris"}
FULL_RECORD: dict[str, Any] = EDIT | {
    "target_true": "Paris",
    "paraphrases": ["To see the {}, one travels to"],
    "neighborhood": [{"prompt": "Big Ben is in the city of", "target": "London"}],
    "generation_prompts": ["The Louvre is known for"],
}
MODEL = Model(info=INFO)


@lru_cache
def _encoder() -> TextEncoder:
    """Return the shipped model's tokenizer with the tokens of a chat model, and one token beyond the embedding."""
    raw = Tokenizer.from_file(str(ROOT / "models" / "almanac" / "tokenizer.json"))
    raw.add_special_tokens(["<|im_start|>", TURN])
    rows = raw.get_vocab_size()
    raw.add_tokens([EXTRA])
    return TextEncoder(raw, 64, rows)


def _edit(**change: Any) -> None:
    validate_edit(EditRequest.model_validate(EDIT | change), MODEL, _encoder())


def _trace(**change: Any) -> None:
    validate_trace(TraceRequest.model_validate(TRACE | change), _encoder())


def _evaluate(record: dict[str, Any]) -> None:
    validate_evaluation(EvaluationRequest(records=[record]), MODEL, _encoder())


def _generate(**prompts: Any) -> None:
    validate_generation(WorkerGenerateRequest(**prompts), _encoder())


@pytest.mark.parametrize("token", [TURN, END])
@pytest.mark.parametrize(
    ("field", "template"),
    [
        ("subject", {"subject": "TEXT"}),
        ("prompt", {"prompt": "TEXT {} is in"}),
        ("target_new", {"target_new": "Rome TEXT"}),
        ("target_true", {"target_true": "TEXT"}),
        ("probes.paraphrase.0.prompt", {"probes": {"paraphrase": ["TEXT {} is in"]}}),
        ("probes.neighborhood.0.prompt", {"probes": {"neighborhood": [{"prompt": "TEXT", "target": "a"}]}}),
        ("probes.neighborhood.0.target", {"probes": {"neighborhood": [{"prompt": "a", "target": "TEXT"}]}}),
    ],
)
def test_an_edit_with_a_special_token_is_refused(field: str, template: dict[str, Any], token: str) -> None:
    """A special token in any text of an edit is refused with the field and the token."""
    with pytest.raises(InvalidInput) as error:
        _edit(**_replace(template, "TEXT", token))
    assert error.value.field == field
    assert repr(token) in error.value.detail


def test_a_special_token_made_of_subject_and_prompt_is_refused() -> None:
    """Prompt and subject that form a special token together are refused."""
    with pytest.raises(InvalidInput, match="special token") as error:
        _edit(subject="<|im_", prompt="{}end|> is in")
    assert error.value.field == "prompt"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("subject", {"subject": TURN, "prompt": f"The {TURN} is"}),
        ("prompt", {"prompt": f"Louvre{TURN} is"}),
        ("target", {"target": TURN}),
    ],
)
def test_a_trace_with_a_special_token_is_refused(field: str, change: dict[str, Any]) -> None:
    """A special token in any text of a trace is refused with the field."""
    with pytest.raises(InvalidInput, match="special token") as error:
        _trace(**change)
    assert error.value.field == field


@pytest.mark.parametrize(
    "template",
    [
        {"subject": "TEXT"},
        {"prompt": "TEXT {} is in"},
        {"target_new": "TEXT"},
        {"target_true": "TEXT"},
        {"paraphrases": ["a {}", "TEXT"]},
        {"neighborhood": [{"prompt": "TEXT", "target": "a"}]},
        {"neighborhood": [{"prompt": "a", "target": "TEXT"}]},
        {"generation_prompts": ["TEXT"]},
    ],
)
def test_a_record_with_a_special_token_is_refused(template: dict[str, Any]) -> None:
    """A special token in any text of a record that the model reads is refused; the error names record and token."""
    _evaluate(FULL_RECORD)
    with pytest.raises(InvalidInput, match=r"record 1: `\w+` contains '<.im_end.>'") as error:
        _evaluate(FULL_RECORD | _replace(template, "TEXT", TURN))
    assert error.value.field == "records"


def test_a_prompt_of_a_generation_may_have_special_tokens() -> None:
    """The chat template of a model consists of special tokens: generations accept them."""
    _generate(prompt=f"{END}<|im_start|>user\nHello{TURN}\n")


@pytest.mark.parametrize("space", [" ", "\n", "\t ", "\u3000"])
def test_white_space_around_a_subject_or_object_is_removed(space: str) -> None:
    """White space around a subject or an object is no part of it, in an edit, its probes, an import and a trace."""
    neighbors = [{"prompt": "Big Ben is in", "target": space + "London"}]
    change = {
        "subject": f"{space}Louvre{space}",
        "target_new": f"Rome{space}",
        "target_true": f"{space}Paris",
    }
    edit = EditRequest.model_validate(EDIT | change | {"probes": {"neighborhood": neighbors}})
    assert (edit.subject, edit.target_new, edit.target_true) == ("Louvre", "Rome", "Paris")
    assert (edit.given_neighbors or [])[0].target == "London"
    assert edit.statement.text == "The Louvre is in the city of"
    imported = ExportedEdit.model_fields["request"].annotation
    assert imported is EditRequest
    trace = TraceRequest.model_validate(TRACE | {"subject": f"Louvre{space}", "target": f"{space}Paris"})
    assert trace.statement.text[slice(*trace.statement.span)] == "Louvre"
    assert trace.target == "Paris"


def test_a_subject_of_white_space_is_refused() -> None:
    """White space alone is no subject."""
    with pytest.raises(ValidationError):
        EditRequest.model_validate(EDIT | {"subject": "\n "})


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("prompt", lambda: _edit(subject=EXTRA)),
        ("target_new", lambda: _edit(target_new=EXTRA)),
        ("probes.paraphrase.0.prompt", lambda: _edit(probes={"paraphrase": [EXTRA]})),
        ("target", lambda: _trace(target=EXTRA)),
        ("records", lambda: _evaluate(EDIT | {"paraphrases": [EXTRA]})),
        ("prompt", lambda: _generate(prompts=["Louvre", EXTRA])),
        ("prompt", lambda: _generate(tokens=[[1, _encoder().vocabulary]])),
    ],
)
def test_a_token_beyond_the_embedding_is_refused(field: str, call: Any) -> None:
    """A text or a list of ids with a token that the tokenizer has and the model has not is refused."""
    with pytest.raises(InvalidInput, match="no embedding for the token") as error:
        call()
    assert error.value.field == field


def _replace(value: Any, name: str, text: str) -> Any:
    """Return JSON with a text in place of a name in all of its strings."""
    if isinstance(value, dict):
        return {key: _replace(item, name, text) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace(item, name, text) for item in value]
    return value.replace(name, text) if isinstance(value, str) else value


def test_gated_edits_have_the_method_that_can_be_gated() -> None:
    """Of several edits that name no method, a gated one is not given the recipe's method for several."""
    recipe = {"source": "test", "rome": {"layers": [1]}, "batch_method": "memit"}
    edits = [EditRequest.model_validate(EDIT | extra) for extra in ({}, {"form": "gated"}, {"method": "ft"})]
    resolved = resolve_methods(edits, Model(info={**INFO, "recipe": recipe}))
    assert [r.method for r in resolved] == ["memit", "rome", "ft"]
