"""workers.model_info."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest

from service.kit.chat_format import MAX_TEMPLATE
from service.models.loading import LoadedModel, with_bos
from tests.support.chat_templates import CHATML
from tests.support.tiny_models import END, tiny
from workers.model_info import chat_info


def with_template(template: Any) -> LoadedModel:
    model = tiny()
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return replace(model, tokenizer=tokenizer)


@pytest.mark.parametrize("template", [CHATML, {"tool_use": "no", "default": CHATML}])
def test_a_worker_ships_its_chat_template(template: Any) -> None:
    """The template, or the default one of several, is registered with the special tokens that it can use; also when
    the recipe adds a BOS token."""
    expected = {"template": CHATML, "special_tokens": {"bos_token": END, "eos_token": END}}
    assert chat_info(with_template(template)) == expected
    assert chat_info(with_bos(with_template(template))) == expected


def test_a_model_can_have_no_usable_template(caplog: pytest.LogCaptureFixture) -> None:
    """Without a template, with named ones alone, or with one that is too long there is none; the last one is logged."""
    with caplog.at_level(logging.WARNING):
        assert chat_info(with_template(None)) is chat_info(with_template({"tool_use": "x"})) is None
        assert caplog.text == ""
        assert chat_info(with_template("x" * (MAX_TEMPLATE + 1))) is None
    assert "chat template ignored" in caplog.text
