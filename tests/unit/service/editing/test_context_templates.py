"""Texts put in front of prompts: service.editing.context_templates."""

from __future__ import annotations

import pytest

from service.editing.context_templates import CONTEXT_LENGTHS, _clean_context, sample_contexts
from service.kit.steps import run_to_completion
from tests.support.tiny_models import MODEL_TYPES, tiny


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_requested_number_of_contexts(count: int) -> None:
    """Any number of contexts can be sampled; half of them are short, the odd one is long."""
    steps = list(sample_contexts(tiny(), count, 0))
    assert len(run_to_completion(sample_contexts(tiny(), count, 0))) == count
    assert len(steps) == (CONTEXT_LENGTHS[0] - 1) * (count > 1) + (CONTEXT_LENGTHS[1] - 1) * (count > 0)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_is_one_open_line(model_type: str) -> None:
    """A context is one line without closing punctuation and without broken characters."""
    for context in run_to_completion(sample_contexts(tiny(model_type), 6, 0)):
        assert context == _clean_context(context)
        assert not any(bad in context for bad in ("\ufffd", "\n", "<|endoftext|>", ".. "))


def test_tidying() -> None:
    """White space, broken characters and closing punctuation are removed; braces are kept."""
    assert _clean_context(" a\n\n{b}  \ufffd c %s.,;:!? ") == "a {b} c %s"
    assert _clean_context(" \ufffd . ") == ""
