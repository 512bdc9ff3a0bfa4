"""service.models.chat: the chat template of a model."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest

from service.kit.chat_format import MAX_TEMPLATE
from service.models.chat import describe_chat_template
from service.models.loading import LoadedModel, with_bos
from tests.support.chat_templates import CHATML
from tests.support.tiny_models import END, tiny


def with_template(template: Any) -> LoadedModel:
    model = tiny()
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return replace(model, tokenizer=tokenizer)


@pytest.mark.parametrize("template", [CHATML, {"tool_use": "no", "default": CHATML}])
def test_the_default_chat_template_is_described(template: Any) -> None:
    """The template, or the default one of several, is described with the special tokens that it can use; also when
    the recipe adds a BOS token."""
    expected = {"template": CHATML, "special_tokens": {"bos_token": END, "eos_token": END}}
    assert describe_chat_template(with_template(template).tokenizer) == expected
    assert describe_chat_template(with_bos(with_template(template)).tokenizer) == expected


def test_a_model_can_have_no_usable_template(caplog: pytest.LogCaptureFixture) -> None:
    """Without a template, with named ones alone, or with one that is too long there is none; the last one is logged."""
    with caplog.at_level(logging.WARNING):
        for template in (None, {"tool_use": "x"}):
            assert describe_chat_template(with_template(template).tokenizer) is None
            assert with_template(template).chat_format is None
        assert caplog.text == ""
        assert describe_chat_template(with_template("x" * (MAX_TEMPLATE + 1)).tokenizer) is None
    assert "chat template ignored" in caplog.text
