"""Tests of service.kit.text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.errors import InvalidInput
from service.kit.text import (
    check_text,
    fact_key,
    fill_prompt,
    find_mentions,
    locate_subject,
    token_span,
)
from tests.support.tiny_models import tokenizer

TEXT = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), st.sampled_from("{}%東京é🗼")
    )
)
WORDS = TEXT.filter(lambda s: bool(s.strip()))
RAW = tokenizer().backend_tokenizer


@settings(max_examples=100, deadline=None)
@given(TEXT, WORDS, TEXT)
def test_a_filled_prompt_holds_the_subject_at_its_span(before: str, subject: str, after: str) -> None:
    """For any characters, braces included, the subject is at its span and the rest is unchanged."""
    prompt = before + "{}" + after
    assume(prompt.count("{}") == 1)
    statement = fill_prompt(prompt, subject)
    assert statement.text == before + subject + after
    assert statement.text[slice(*statement.span)] == subject


@settings(max_examples=60, deadline=None)
@given(WORDS, TEXT, TEXT)
def test_locate_subject_finds_the_last_mention(subject: str, before: str, after: str) -> None:
    """`locate_subject` returns the last occurrence."""
    statement = locate_subject(before + subject + after, subject)
    assert statement.text[slice(*statement.span)] == subject
    assert statement.span[0] == statement.text.rfind(subject) >= len(before)


@settings(max_examples=60, deadline=None)
@given(WORDS, TEXT, TEXT)
def test_the_statement_s_own_mention_is_among_the_mentions(subject: str, before: str, after: str) -> None:
    """For any characters the mentions contain the statement's span, have the subject's words and do not overlap."""
    statement = locate_subject(before + subject + after, subject)
    mentions = find_mentions(statement)
    assert statement.span in mentions
    assert all(statement.text[a:b].split() == subject.split() for a, b in mentions)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(mentions))


@pytest.mark.parametrize(
    ("text", "subject", "count"),
    [
        ("Japan? The capital of Japan is", "Japan", 2),
        ("Japanese, JapanX, 2Japan, japan and Japan's: Japan", "Japan", 2),
        ("The Eiffel\nTower, the Eiffel  Tower: Eiffel Tower", "Eiffel Tower", 3),
        ("\u6771\u4eac\u90fd\u306e\u6771\u4eac\u306f", "\u6771\u4eac", 2),
        ("\uc11c\uc6b8\uc740 \uc11c\uc6b8", "\uc11c\uc6b8", 2),
        ("C++ and C+++ and C++", "C++", 3),
        ("{} (a.b) a.b axb", "a.b", 2),
    ],
)
def test_mentions_are_whole_words(text: str, subject: str, count: int) -> None:
    """A mention has the subject's spelling and is no part of a longer word; in scripts that join words, words may
    follow it."""
    assert len(find_mentions(locate_subject(text, subject))) == count


@settings(max_examples=60, deadline=None)
@given(WORDS, TEXT)
def test_a_statement_after_a_context_keeps_its_subject(subject: str, context: str) -> None:
    """A context shifts the span and is never formatted."""
    statement = fill_prompt("Of {} one says", subject).with_context(context)
    assert statement.text == context + "Of " + subject + " one says"
    assert statement.text[slice(*statement.span)] == subject


@pytest.mark.parametrize("prompt", ["no slot", "{} and {}", "{0}", "{name}", "{ }"])
def test_a_prompt_has_exactly_one_slot(prompt: str) -> None:
    """A prompt with no or two placeholders is rejected; the error shows a valid one."""
    with pytest.raises(InvalidInput, match=r"exactly one \{\}.*for example") as error:
        fill_prompt(prompt, "Rome")
    assert error.value.field == "prompt"


def test_format_fields_in_user_text_are_only_characters() -> None:
    """User text is never passed to `str.format`: fields and percent signs are unchanged."""
    statement = fill_prompt("The {} of {0.__class__} and %s is", "T{x!r}wer {{")
    assert statement.text == "The T{x!r}wer {{ of {0.__class__} and %s is"


@pytest.mark.parametrize("text", ["", "  \n\t", "\u3000", "a\x00b", "\ud800", "x\udfff"])
def test_what_is_no_text_is_refused(text: str) -> None:
    """White space alone, NUL and lone surrogates are rejected with the name of the field."""
    with pytest.raises(InvalidInput) as error:
        check_text(text, "subject")
    assert error.value.field == "subject"
    with pytest.raises(InvalidInput):
        fill_prompt("The {} is", text)


def test_a_subject_that_is_not_there_is_named() -> None:
    """A subject that does not occur in the prompt is rejected; the error names it."""
    with pytest.raises(InvalidInput, match="'Rome' does not occur"):
        locate_subject("The city of Paris", "Rome")


@settings(max_examples=150, deadline=None)
@given(TEXT, WORDS, TEXT)
def test_a_token_span_is_every_token_that_touches_the_subject(before: str, subject: str, after: str) -> None:
    """The span equals that of a character-by-character oracle."""
    text = before + subject + after
    code = RAW.encode(text)
    span = (len(before), len(before) + len(subject))
    marked = set(range(*span))
    touching = [i for i, (a, b) in enumerate(code.offsets) if marked & set(range(a, b))]
    assert token_span(code.offsets, span) == (touching[0], touching[-1] + 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 30), st.integers(1, 10))
def test_any_offsets_give_the_tokens_that_overlap(widths: list[int], start: int, length: int) -> None:
    """Tokens with empty offsets never belong to a span; a span without a token is rejected."""
    offsets, at = [], 0
    for width in widths:
        offsets.append((at, at + width))
        at += width
    touching = [i for i, (a, b) in enumerate(offsets) if set(range(a, b)) & set(range(start, start + length))]
    if not touching:
        with pytest.raises(InvalidInput, match="no tokens of its own"):
            token_span(offsets, (start, start + length))
    else:
        assert token_span(offsets, (start, start + length)) == (touching[0], touching[-1] + 1)


def test_a_start_token_is_passed_over() -> None:
    """A special token before the text shifts the tokens of a subject by one and belongs to none."""
    text, span = "Rome is old", (0, 4)
    plain = token_span(RAW.encode(text).offsets, span)
    special = token_span(tokenizer(bos=True).backend_tokenizer.encode(text).offsets, span)
    assert plain[0] == 0
    assert special == (plain[0] + 1, plain[1] + 1)


def test_fact_key_ignores_white_space_only() -> None:
    """`fact_key` ignores white space only, not case or the boundary of subject and prompt."""
    assert fact_key(" Eiffel  Tower", "{} is\nin ") == fact_key("Eiffel Tower", "{} is in")
    assert fact_key("Eiffel Tower", "{} is in") != fact_key("eiffel tower", "{} is in")
    assert fact_key("a b", "{}") != fact_key("a", "b {}")
