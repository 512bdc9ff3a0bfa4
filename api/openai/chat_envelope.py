"""Answers to conversations in OpenAI's form: in one response, or as chunks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from api.openai.streaming import CompletionEnvelope, LogprobColumns

#: a token that is a part of a character, as the worker writes it
_BYTES_TOKEN = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")


@dataclass
class ChatEnvelope(CompletionEnvelope):
    """The members that every chunk of one answer has, beside its choices, and the form of a choice."""

    id_prefix: ClassVar[str] = "chatcmpl"
    object_name: ClassVar[str] = "chat.completion"
    chunk_name: ClassVar[str] = "chat.completion.chunk"

    started: set[int] = field(default_factory=set)  #: the choices whose role was sent

    def choice(
        self, index: int, text: str, logprobs: LogprobColumns | None, finish_reason: str | None
    ) -> dict[str, Any]:
        """Return a whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, **self._rest(index, logprobs, finish_reason)}

    def choice_part(
        self, index: int, text: str, logprobs: LogprobColumns | None, finish_reason: str | None
    ) -> dict[str, Any]:
        """Return the next part of a choice that is streamed. The first one has the role."""
        is_first = index not in self.started
        self.started.add(index)
        delta = ({"role": "assistant"} if is_first else {}) | ({"content": text} if text or is_first else {})
        return {"delta": delta, **self._rest(index, logprobs, finish_reason)}

    def _rest(self, index: int, logprobs: LogprobColumns | None, finish_reason: str | None) -> dict[str, Any]:
        top = self.pending.request.logprobs or 0
        return {
            "index": index,
            "logprobs": None if logprobs is None else chat_logprobs(logprobs, top),
            "finish_reason": finish_reason,
        }


def chat_logprobs(columns: LogprobColumns, top: int) -> dict[str, Any]:
    """Return the log-probabilities of tokens in the form of chat completions, with the `top` most probable tokens."""
    rows = zip(columns["tokens"], columns["token_logprobs"], columns["top_logprobs"], strict=True)
    content = [
        # the worker adds the token itself after the most probable ones
        {
            **_token(text, log_p),
            "top_logprobs": [_token(other, p) for other, p in list((best or {}).items())[:top]],
        }
        for text, log_p, best in rows
    ]
    return {"content": content, "refusal": None}


def _token(text: str, log_p: float) -> dict[str, Any]:
    written = _BYTES_TOKEN.fullmatch(text)
    data = bytes.fromhex(written[1].replace("\\x", "")) if written else text.encode()
    return {"token": text, "logprob": log_p, "bytes": list(data)}
