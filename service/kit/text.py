"""Prompts with a slot for the subject, as characters. Pure, and free of torch: the API checks user text with it.

User text is never passed to `str.format`: a prompt is split at its one `{}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidInput

PLACEHOLDER = "{}"
Span = tuple[int, int]


@dataclass(frozen=True)
class Statement:
    """A text that holds its subject at `span` (characters, end exclusive)."""

    text: str
    span: Span

    def with_context(self, context: str) -> Statement:
        """The same statement after some other text."""
        shift = len(context)
        return Statement(context + self.text, (self.span[0] + shift, self.span[1] + shift))


def check_text(text: str, field: str) -> None:
    """Refuse what no tokenizer can take: nothing but white space, lone surrogates, NUL."""
    if not text.strip():
        raise InvalidInput(f"`{field}` is empty: write some text.", field)
    if "\x00" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise InvalidInput(f"`{field}` holds a character that is no text: remove it.", field)


def fill_prompt(prompt: str, subject: str, field: str = "prompt") -> Statement:
    """Put the subject into the prompt's one `{}`."""
    check_text(subject, "subject")
    check_text(prompt, field)
    if prompt.count(PLACEHOLDER) != 1:
        count = "none" if PLACEHOLDER not in prompt else str(prompt.count(PLACEHOLDER))
        raise InvalidInput(
            f"`{field}` must hold exactly one {PLACEHOLDER} where the subject stands; it has {count}. "
            "Write for example: {} is located in the city of",
            field,
        )
    before, after = prompt.split(PLACEHOLDER)
    return Statement(before + subject + after, (len(before), len(before) + len(subject)))


def locate_subject(text: str, subject: str, field: str = "subject") -> Statement:
    """A plain prompt and the place of the subject in it; the last mention when there are several."""
    check_text(text, "prompt")
    check_text(subject, field)
    start = text.rfind(subject)
    if start < 0:
        raise InvalidInput(
            f"the subject {subject!r} does not occur in the prompt: spell it as the prompt does.",
            field,
        )
    return Statement(text, (start, start + len(subject)))


def separator(prompt: str, target: str) -> str:
    """What stands between a prompt and its object: one space, unless one is there or the script uses none."""
    if not prompt or prompt[-1].isspace() or target[:1].isspace():
        return ""
    cjk = "\u2e80" <= target[0] <= "\u9fff" or "\uac00" <= target[0] <= "\ud7af"
    return "" if cjk or prompt[-1] in "([{\"'«“‘" else " "


def token_span(offsets: Sequence[Span], span: Span) -> Span:
    """Tokens [b, e) that overlap the characters [start, end), given the whole text's character offsets.

    Always on the whole tokenised text, never by tokenising pieces (methods A.3): special tokens have empty
    offsets and are passed over, and a token that spans the boundary belongs to the span.
    """
    start, end = span
    overlapping = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    if not overlapping:
        raise InvalidInput("the subject vanishes when the prompt is tokenised.", "subject")
    return overlapping[0], overlapping[-1] + 1


def normalize_whitespace(text: str) -> str:
    """A text up to white space: what tells subjects apart."""
    return " ".join(text.split())


def fact_key(subject: str, prompt: str) -> str:
    """Two edits with this key speak of the same fact: subject and prompt, up to white space."""
    return normalize_whitespace(subject) + "\n" + normalize_whitespace(prompt)


def check_tokens(tokenizer: Any, prompt: str, target: str | None, positions: int) -> None:
    """Refuse a prompt that is too long and a target that is lost or merges with the prompt.

    `tokenizer` is a `tokenizers.Tokenizer`. `positions` is the model's context length.
    """
    ids = tokenizer.encode(prompt).ids
    if len(ids) >= positions:
        raise InvalidInput(
            f"the prompt has {len(ids)} tokens and the model has {positions} positions: shorten it to at most "
            f"{positions - 1} tokens.",
            "prompt",
        )
    if target is None:
        return
    sep = separator(prompt, target)
    joint = tokenizer.encode(prompt + sep + target).ids
    target_ids = joint[len(ids) :]
    if joint[: len(ids)] != ids or not target_ids:
        raise InvalidInput(
            f"the target {target!r} merges with the end of the prompt when tokenised: end the prompt at a word "
            "boundary.",
            "target",
        )
    decoded_target = tokenizer.decode(target_ids, skip_special_tokens=True).strip()
    if decoded_target != target.strip():
        raise InvalidInput(
            f"the model's tokenizer cannot represent the target {target!r}: it would say {decoded_target!r}. "
            "Write it with other characters.",
            "target",
        )
    if len(joint) > positions:
        raise InvalidInput(
            f"prompt and target have {len(joint)} tokens and the model has {positions} positions: shorten them.",
            "prompt",
        )
