"""What a trace asks of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.errors import InvalidInput
from service.kit.text import Statement, fill, find
from service.models.loading import LoadedModel
from service.tracing.trace_input import Question, ask
from tests.support.tiny_models import tiny


def question(model: LoadedModel, statement: Statement, target: str | None = None, **changes: Any) -> Question:
    asked: dict[str, Any] = {"samples": 2, "noise": 0.1, "seed": 1, "compat": None, "subjects": ()}
    return ask(model, statement, target, **(asked | changes))


@pytest.mark.parametrize("bos", [False, True])
def test_the_subject_is_found_in_the_whole_text(bos: bool) -> None:
    """The subject's range counts a special first token once, wherever the subject stands."""
    for text in ("The Eiffel Tower is in", "Eiffel Tower is in", "(Eiffel Tower) is in"):
        q = question(tiny(bos=bos), find(text, "Eiffel Tower"))
        b, e = q.subject
        assert "".join(q.tokens[b:e]).strip(" ()") == "Eiffel Tower"
        assert q.noise.shape[:2] == (2, e - b)


def test_the_last_mention_is_corrupted() -> None:
    """Of several mentions it is the last that counts."""
    q = question(tiny(), find("Rome, said Rome. Rome is in", "Rome"))
    assert "".join(q.tokens[: q.subject[0]]).strip() == "Rome, said Rome."


def test_a_template_says_which_mention() -> None:
    """A prompt with a slot names the mention itself."""
    q = question(tiny(), fill("{} is not Rome but in", "Rome"))
    assert q.subject[0] == 0


@pytest.mark.parametrize("bos", [False, True])
def test_the_answer_follows_the_prompt(bos: bool) -> None:
    """Prompt and answer are one tokenisation: all tokens but the answer's last are read, none is decoded again."""
    model = tiny(bos=bos)
    q = question(model, find("Big Ben is in", "Big Ben"), "São Paulo")
    whole = model.encode("Big Ben is in São Paulo")[0]
    assert len(q.answer_ids) > 1
    assert [*q.ids, q.answer_ids[-1]] == whole
    assert list(q.ids[: q.length]) == whole[: q.length]
    assert q.answer == " São Paulo"


def test_the_own_next_token() -> None:
    """Without a target the answer is the model's greedy next token."""
    model = tiny()
    q = question(model, find("Big Ben is in", "Big Ben"))
    logits = model.model(torch.tensor([q.ids])).logits
    assert q.answer_ids == (logits[0, -1].argmax().item(),)


def test_tokens_read_as_the_text() -> None:
    """Put together, the tokens of a text of one-byte characters are the text."""
    q = question(tiny(), find("The  Eiffel\nTower is in", "Tower"))
    assert "".join(q.tokens) == "The  Eiffel\nTower is in"


def test_characters_of_several_tokens() -> None:
    """A character that several tokens share is shown by each of them whole, with a count, never as broken bytes."""
    q = question(tiny(), find("In 東京 is", "東京"))
    assert q.tokens == (
        "In",
        " ",
        "東 (1/3)",
        "東 (2/3)",
        "東 (3/3)",
        "京 (1/3)",
        "京 (2/3)",
        "京 (3/3)",
        " is",
    )
    assert q.subject == (2, 8)


def test_special_tokens_have_names() -> None:
    """A token that stands for no text is shown by its name."""
    assert question(tiny(bos=True), find("Rome is in", "Rome")).tokens[0] == "<|endoftext|>"


def test_too_long() -> None:
    """A text longer than the model's positions is refused before anything runs."""
    with pytest.raises(InvalidInput, match="positions"):
        question(tiny(positions=8), find("The Eiffel Tower is located in the city of", "Eiffel Tower"))


def test_joint_probability() -> None:
    """The probability of an answer is the product over its tokens."""
    q = question(tiny(), find("Rome is in", "Rome"), " in the")
    n = len(q.answer_ids)
    logits = torch.randn(4, n, 320)
    p = logits.softmax(-1)
    product = torch.stack([p[:, j, t] for j, t in enumerate(q.answer_ids)]).prod(0)
    assert torch.allclose(q.joint(logits), product)
