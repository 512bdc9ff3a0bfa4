"""Conversations as the tokens of a model, in the form of its chat template. This module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from service.errors import InvalidInput
from service.kit.template_renderer import TemplateRenderer
from service.kit.text_encoder import TextEncoder

MAX_TEMPLATE = 200_000  #: characters of a template
MESSAGES_FIELD = "messages"
#: added to a last message that is to be continued, and searched in the rendered text, as transformers does
_CONTINUATION_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
#: the content of a message after which the end of a turn is searched
_PROBE = "turn"

#: role and content
Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """The chat template of a model with its tokenizer.

    Special tokens of the template are special tokens of the prompt. Those in the content of a message are refused: a
    message could otherwise end its own turn and begin one of another role.
    """

    template: str
    special_tokens: Mapping[str, str]  #: such as `bos_token`, by the name that a template uses
    encoder: TextEncoder
    renderer: TemplateRenderer

    def prompt_text(self, messages: Sequence[Message], continue_final: bool = False) -> str:
        """Return the text that the model continues with its answer, or with the rest of the last message."""
        for number, message in enumerate(messages):
            self.encoder.check_plain(message["content"], f"{MESSAGES_FIELD}.{number}.content")
        if not continue_final:
            return self._render(messages, add_generation_prompt=True)
        *others, last = messages
        if last["role"] != "assistant":
            raise InvalidInput(
                "`continue_final_message` continues a message of the assistant, and the last one is of the role "
                f"{last['role']!r}: leave it out.",
                MESSAGES_FIELD,
            )
        marked = {**last, "content": last["content"] + _CONTINUATION_MARK}
        text = self._render([*others, marked], add_generation_prompt=False)
        return _text_before_mark(text, last["content"])

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered text. Raise InvalidInput if it does not fit the model."""
        self.encoder.check_characters(text, MESSAGES_FIELD)
        ids: list[int] = self.encoder.tokenize(text, add_special_tokens=False).ids
        if max(ids, default=0) >= self.encoder.vocabulary:
            self.encoder.check_ids(ids, MESSAGES_FIELD)
        if not 0 < len(ids) < self.encoder.positions:
            raise InvalidInput(
                f"the conversation has {len(ids)} tokens and the model has {self.encoder.positions} positions: leave "
                f"out its first messages, or shorten them, to at most {self.encoder.positions - 1} tokens.",
                MESSAGES_FIELD,
            )
        return ids

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """The token with which the template ends a turn of the assistant. Empty if it ends a turn with plain text."""
        question, answer = {"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}
        try:
            text = self._render([question, answer], add_generation_prompt=False)
        except InvalidInput:
            return ()
        tokenizer = self.encoder.tokenizer
        added = tokenizer.get_added_tokens_decoder()
        for token_id in tokenizer.encode(text.rpartition(_PROBE)[2], add_special_tokens=False).ids:
            if token_id in added:
                return (token_id,)
            if tokenizer.decode([token_id]).strip():
                return ()
        return ()

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        variables = {
            **self.special_tokens,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self.renderer.render(self.template, variables, MESSAGES_FIELD)


def _text_before_mark(text: str, content: str) -> str:
    mark = _CONTINUATION_MARK.strip()
    start = text.rfind(mark)
    if start < 0 or content.strip() not in text:
        raise InvalidInput(
            "the model's chat template does not keep the last message as it is, so it cannot be continued: leave out "
            "`continue_final_message`.",
            MESSAGES_FIELD,
        )
    has_space = text.startswith(_CONTINUATION_MARK, start)
    return text[:start] if has_space else text[:start].rstrip()
