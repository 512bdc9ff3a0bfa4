"""Tests of service.models.token_batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.kit.text import fill_prompt
from service.models.token_batch import forward, pad, tokenize_prompt_and_target, tokenize_statement
from tests.support.tiny_models import MODEL_TYPES, tiny

MODEL = tiny()
TEXTS = ["Big Ben", "The Eiffel Tower is located in the city of", "In which country is Mount Fuji?"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_padding_and_other_rows_change_no_logits(model_type: str, side: str) -> None:
    """In fp64, each row of a padded batch has the logits that it has alone, for both sides and every architecture."""
    exact = 1e-6 if model_type == "gptj" else 1e-9  # GPT-J attends in fp32 whatever the dtype
    model = tiny(model_type, dtype=torch.float64)
    rows = [model.encode(t)[0] for t in TEXTS]
    with torch.no_grad():
        batch_logits = forward(model, pad(rows, model, side))
        for row, logits in zip(rows, batch_logits, strict=True):
            alone = forward(model, pad([row], model))[0]
            real = logits[: len(row)] if side == "right" else logits[-len(row) :]
            torch.testing.assert_close(real, alone, rtol=exact, atol=exact)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=7), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_a_batch_holds_its_rows(rows: list[list[int]], side: str) -> None:
    """The mask selects exactly the row's tokens, with positions from zero."""
    batch = pad(rows, MODEL, side)
    assert batch.lengths == [len(r) for r in rows]
    for i, row in enumerate(rows):
        real = batch.mask[i].bool()
        assert batch.ids[i][real].tolist() == row
        assert batch.positions[i][real].tolist() == list(range(len(row)))
        assert bool(real[0] if side == "right" else real[-1])


@pytest.mark.parametrize("bos", [False, True])
def test_the_subject_is_found_in_the_whole_text(bos: bool) -> None:
    """The subject's tokens are those of the whole text that contain its characters, with or without a BOS token."""
    model = tiny("llama", bos=bos)
    statement = fill_prompt("In São Paulo, {}'s is", "Eiffel Tower")
    tokenized = tokenize_statement(model, statement)
    begin, end = tokenized.subject
    assert model.decode(tokenized.ids[begin:end]).strip() == "Eiffel Tower"
    assert tokenized.last_subject_index == end - 1
    assert tokenized.ids == model.encode(statement.text)[0]


def test_the_edited_token_is_counted_from_the_end_of_the_subject() -> None:
    """The edited token has so many of the subject's tokens after it; it is the first one where there are fewer."""
    statement = fill_prompt("In São Paulo, {}'s is", "Eiffel Tower")
    begin, end = tokenize_statement(MODEL, statement).subject
    assert end - begin > 2
    for tokens_after, expected in ((0, end - 1), (1, end - 2), (end - begin - 1, begin), (99, begin)):
        tokenized = tokenize_statement(MODEL, statement, tokens_after)
        assert tokenized.edited_index == tokenized.through_subject().edited_index == expected


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The city of", "Rome"),
        ("The city of ", "Rome"),
        ("The city of", " Rome"),
        ("首都は", "東京"),
        ("The city of", "São Paulo, Brazil"),
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_object_are_one_tokenisation(prompt: str, target: str, bos: bool) -> None:
    """Prompt and object are tokenized jointly and split where the object begins."""
    model = tiny("llama", bos=bos)
    before, after = tokenize_prompt_and_target(model, prompt, target)
    between = "" if prompt[-1] == " " or target[0] == " " or prompt == "首都は" else " "
    assert before + after == model.encode(prompt + between + target)[0]
    assert model.decode(after).strip() == target.strip()
    assert model.decode(before).strip() == prompt.strip()
