"""service.kit.chat_template."""

from __future__ import annotations

from datetime import datetime

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from service.kit.chat_template import MAX_RENDERED, RefusedByTemplate, RenderedTooLong, render
from tests.support.chat_templates import CONVERSATIONS, LLAMA, MISTRAL, TEMPLATES, message
from tests.support.tiny_models import tokenizer


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    """A tokenizer of transformers."""
    return tokenizer()


@pytest.mark.parametrize("style", TEMPLATES)
def test_texts_are_those_of_transformers(reference: PreTrainedTokenizerFast, style: str) -> None:
    """Templates of three styles give the text that transformers gives, with and without the begin of an answer."""
    for messages in CONVERSATIONS:
        for begins in (True, False):
            expected = reference.apply_chat_template(
                messages, chat_template=TEMPLATES[style], add_generation_prompt=begins, tokenize=False
            )
            variables = {**reference.special_tokens_map, "tools": None, "messages": messages}
            assert render(TEMPLATES[style], variables | {"add_generation_prompt": begins}) == expected


def test_json_and_dates_are_those_of_transformers(reference: PreTrainedTokenizerFast) -> None:
    """`tojson` escapes no character of HTML and indents, and `strftime_now` formats the date."""
    source = "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}"
    messages = [message("user", "<é & '\">")]
    expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False)
    assert render(source, {"messages": messages}) == expected
    assert expected.endswith(str(datetime.now().astimezone().year))


def test_a_template_can_refuse_messages() -> None:
    """`raise_exception` of a template is an error of its own, with the words of the template."""
    with pytest.raises(RefusedByTemplate, match="must alternate"):
        render(MISTRAL, {"messages": [message("assistant", "Hi")], "bos_token": ""})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% if %}",
        "{% include 'x' %}",
    ],
)
def test_a_template_reaches_nothing_but_its_variables(source: str) -> None:
    """Attributes of Python's own objects, changes of the variables, files and large ranges are errors."""
    with pytest.raises((TemplateError, OverflowError, TypeError)):
        render(source, {"messages": []})


def test_a_text_has_a_maximum_length() -> None:
    """A text above the maximum is an error before the template has ended."""
    source = "{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}"
    with pytest.raises(RenderedTooLong, match=f"{MAX_RENDERED:,}"):
        render(source, {})


def test_white_space_of_statements_is_removed() -> None:
    """A statement on a line of its own leaves no line, and the line's indentation goes with it."""
    assert render("a\n   {% if true %}\nb\n   {% endif %}\n", {}) == "a\nb\n"
    assert render(LLAMA, {"messages": [], "bos_token": "<s>", "tools": None}).startswith("<s>(none)")
