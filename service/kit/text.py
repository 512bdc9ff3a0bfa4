"""Prompts with a placeholder for the subject, as text. This module does not import torch: the API validates with it.

User text is never passed to `str.format`: a prompt is split at its one `{}`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import regex

from service.errors import InvalidInput

PLACEHOLDER = "{}"
_UNUSABLE_CHARACTER = re.compile("[\x00\ud800-\udfff]")  # NUL and lone surrogates
Span = tuple[int, int]
#: scripts that separate phrases, not words, by spaces
SPACELESS_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
#: scripts in which other words, or particles, follow a word without a space
JOINED_SCRIPTS = SPACELESS_SCRIPTS + r"\p{Hangul}"
_SPACED_CHARACTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{JOINED_SCRIPTS}]]"  # a part of a word that spaces delimit


class RenderedText(str):
    """A text that a chat template wrote: its special tokens are written out, and the tokenizer adds none.

    A text that begins with it is one, too.
    """

    __slots__ = ()

    def __add__(self, other: str) -> RenderedText:
        return RenderedText(str.__add__(self, other))


def in_form_of(whole: str, part: str) -> str:
    """Return a text as a rendered one if `whole`, of which it is made, is one."""
    return RenderedText(part) if isinstance(whole, RenderedText) else part


@dataclass(frozen=True)
class Statement:
    """A text and the span of its subject (characters, end exclusive)."""

    text: str
    span: Span
    context_at: int = (
        0  #: where a context is put: before the text, or in a conversation before the subject's message
    )
    sentence: Statement | None = (
        None  #: of a conversation: its last message, if the model is to continue that one
    )

    def with_context(self, context: str) -> Statement:
        """Return the statement with `context` before it."""
        begin, end = self.span
        at, shift = self.context_at, len(context)
        text = in_form_of(self.text, self.text[:at] + context + self.text[at:])
        return Statement(text, (begin + shift, end + shift), at)


def check_text(text: str, field: str) -> None:
    """Raise InvalidInput for text that no tokenizer accepts: only white space, lone surrogates, or NUL."""
    if not text.strip():
        raise InvalidInput(f"`{field}` is empty: write some text.", field)
    if _UNUSABLE_CHARACTER.search(text):
        raise InvalidInput(f"`{field}` contains a NUL or a lone surrogate: remove it.", field)


def fill_prompt(prompt: str, subject: str, field: str = "prompt") -> Statement:
    """Return the prompt with the subject in place of its one `{}`."""
    check_text(subject, "subject")
    check_text(prompt, field)
    if prompt.count(PLACEHOLDER) != 1:
        count = "none" if PLACEHOLDER not in prompt else str(prompt.count(PLACEHOLDER))
        raise InvalidInput(
            f"`{field}` must contain exactly one {PLACEHOLDER} in place of the subject; it has {count}. "
            "Write for example: {} is located in the city of",
            field,
        )
    before, after = prompt.split(PLACEHOLDER)
    return Statement(before + subject + after, (len(before), len(before) + len(subject)))


def locate_subject(text: str, subject: str, field: str = "subject") -> Statement:
    """Return the prompt with the span of the subject: its last occurrence when there are several."""
    check_text(text, "prompt")
    check_text(subject, field)
    start = text.rfind(subject)
    if start < 0:
        raise InvalidInput(
            f"the subject {subject!r} does not occur in the prompt: spell it as the prompt does.",
            field,
        )
    return Statement(text, (start, start + len(subject)))


def find_mentions(statement: Statement) -> list[Span]:
    """Return the spans of all mentions of a statement's subject, in their order.

    A mention has the subject's spelling, up to the amount of white space, and is no part of a longer word. The span of
    the statement is one of them in any case, and none of the others overlaps it.
    """
    begin, end = statement.span
    pattern = _mention_pattern(statement.text[begin:end])
    found = [m.span() for m in pattern.finditer(statement.text)]
    return sorted([statement.span, *(s for s in found if s[1] <= begin or s[0] >= end)])


def spelled_mentions(text: str, name: str) -> list[Span]:
    """Return the spans of a name in exactly this spelling that is no part of a longer word, in their order."""
    return [m.span() for m in _mention_pattern(name).finditer(text) if m[0] == name]


def mentions(text: str, name: str) -> bool:
    """Whether a text contains a name, in capitals or not, that is no part of a longer word."""
    return _mention_pattern(name.casefold()).search(text.casefold()) is not None


def begins_with(text: str, name: str) -> bool:
    """Whether a text begins with a name, in capitals or not, that is no part of a longer word."""
    return _mention_pattern(name.casefold()).match(text.casefold().lstrip()) is not None


def _mention_pattern(name: str) -> regex.Pattern[str]:
    return regex.compile(
        rf"(?V1)(?<!{_SPACED_CHARACTER}(?={_SPACED_CHARACTER}))"
        + r"\s+".join(map(regex.escape, name.split()))
        + rf"(?!(?<={_SPACED_CHARACTER}){_SPACED_CHARACTER})"
    )


def token_span(offsets: Sequence[Span], span: Span) -> Span:
    """Return the tokens [b, e) that overlap the characters [start, end), given the offsets of the whole text.

    The whole text is tokenized at once, because its parts can be tokenized differently. Special tokens have empty
    offsets and are skipped. A token that crosses the boundary belongs to the span.
    """
    start, end = span
    overlapping = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not overlapping:
        raise InvalidInput(
            "the subject has no tokens of its own in the prompt: write it with other characters.", "subject"
        )
    return overlapping[0], overlapping[-1] + 1


def normalize_whitespace(text: str) -> str:
    """Return the text with runs of white space replaced by one space. Subjects are compared in this form."""
    return " ".join(text.split())


def fact_key(subject: str, prompt: str) -> str:
    """Return the key of a fact: subject and prompt, normalized. Two edits with the same key are edits of the same
    fact."""
    return normalize_whitespace(subject) + "\n" + normalize_whitespace(prompt)
