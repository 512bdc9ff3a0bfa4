"""Tests of service.tracing.trace_input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.errors import InvalidInput
from service.kit.text import Statement, fill_prompt, locate_subject
from service.models.loading import LoadedModel
from service.tracing.trace_input import TraceInput, build_trace_input
from tests.support.tiny_models import tiny


def make_input(
    model: LoadedModel, statement: Statement, target: str | None = None, **changes: Any
) -> TraceInput:
    defaults: dict[str, Any] = {"samples": 2, "noise": 0.1, "seed": 1, "compat": None, "subjects": ()}
    return build_trace_input(model, statement, target, **(defaults | changes))


@pytest.mark.parametrize("bos", [False, True])
def test_the_subject_is_found_in_the_whole_text(bos: bool) -> None:
    """The subject's range counts a special first token once."""
    for text in ("The Eiffel Tower is in", "Eiffel Tower is in", "(Eiffel Tower) is in"):
        trace_input = make_input(tiny(bos=bos), locate_subject(text, "Eiffel Tower"))
        b, e = trace_input.subject
        assert "".join(trace_input.tokens[b:e]).strip(" ()") == "Eiffel Tower"
        assert trace_input.noise.shape[:2] == (2, e - b)


def test_every_mention_is_corrupted() -> None:
    """Of several mentions of the subject each has noise of its own, and states are restored at the last one."""
    trace_input = make_input(tiny(), locate_subject("Rome, said Rome. Rome is in", "Rome"))
    assert "".join(trace_input.tokens[: trace_input.subject[0]]).strip() == "Rome, said Rome."
    labels = ["".join(trace_input.tokens[slice(*span)]).strip() for span in trace_input.mentions]
    assert labels == ["Rome"] * 3
    assert trace_input.mentions[-1] == trace_input.subject
    assert trace_input.noise.shape[1] == len(trace_input.corrupted_tokens)
    assert len(trace_input.noise[0].unique(dim=0)) == len(trace_input.corrupted_tokens)


def test_one_mention_is_corrupted_on_request() -> None:
    """With "last" only the mention of the statement is corrupted, with the noise of a prompt without the others."""
    one = make_input(tiny(), locate_subject("Rome, said Rome. Rome is in", "Rome"), mentions="last")
    assert one.mentions == (one.subject,)
    assert torch.equal(one.noise, make_input(tiny(), locate_subject("All Rome is in", "Rome")).noise)


@pytest.mark.parametrize("separator", ["", " "])
def test_the_separator_of_the_request_is_used(separator: str) -> None:
    """The answer is spelled with the separator that the request names."""
    trace_input = make_input(tiny(), locate_subject("Rome costs $", "Rome"), "45", separator=separator)
    assert trace_input.answer == separator + "45"
    assert tiny().decode(list(trace_input.answer_ids)) == separator + "45"


def test_template_selects_the_mention() -> None:
    """A prompt with a placeholder determines the occurrence."""
    trace_input = make_input(tiny(), fill_prompt("{} is not Rome but in", "Rome"))
    assert trace_input.subject[0] == 0


@pytest.mark.parametrize("bos", [False, True])
def test_the_answer_follows_the_prompt(bos: bool) -> None:
    """Prompt and answer are tokenized jointly; all tokens but the answer's last are inputs."""
    model = tiny(bos=bos)
    trace_input = make_input(model, locate_subject("Big Ben is in", "Big Ben"), "São Paulo")
    whole = model.encode("Big Ben is in São Paulo")[0]
    assert len(trace_input.answer_ids) > 1
    assert [*trace_input.ids, trace_input.answer_ids[-1]] == whole
    assert list(trace_input.ids[: trace_input.prompt_length]) == whole[: trace_input.prompt_length]
    assert trace_input.answer == " São Paulo"


def test_default_answer_is_the_greedy_token() -> None:
    """Without a target the answer is the model's greedy next token."""
    model = tiny()
    trace_input = make_input(model, locate_subject("Big Ben is in", "Big Ben"))
    logits = model.model(torch.tensor([trace_input.ids])).logits
    assert trace_input.answer_ids == (logits[0, -1].argmax().item(),)


def test_tokens_read_as_the_text() -> None:
    """For a text of one-byte characters, the joined labels are the text."""
    trace_input = make_input(tiny(), locate_subject("The  Eiffel\nTower is in", "Tower"))
    assert "".join(trace_input.tokens) == "The  Eiffel\nTower is in"


def test_characters_of_several_tokens() -> None:
    """A character that several tokens share is shown whole in each label, with a count."""
    trace_input = make_input(tiny(), locate_subject("In 東京 is", "東京"))
    assert trace_input.tokens == (
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
    assert trace_input.subject == (2, 8)


def test_special_tokens_have_names() -> None:
    """A token without text is shown by its name."""
    assert make_input(tiny(bos=True), locate_subject("Rome is in", "Rome")).tokens[0] == "<|endoftext|>"


def test_too_long() -> None:
    """A text longer than the model's positions is rejected before the first pass."""
    with pytest.raises(InvalidInput, match="positions"):
        make_input(
            tiny(positions=8), locate_subject("The Eiffel Tower is located in the city of", "Eiffel Tower")
        )


def test_joint_probability() -> None:
    """The probability of an answer is the product over its tokens."""
    trace_input = make_input(tiny(), locate_subject("Rome is in", "Rome"), " in the")
    n = len(trace_input.answer_ids)
    logits = torch.randn(4, n, 320)
    p = logits.softmax(-1)
    product = torch.stack([p[:, j, t] for j, t in enumerate(trace_input.answer_ids)]).prod(0)
    assert torch.allclose(trace_input.answer_probability(logits), product)
