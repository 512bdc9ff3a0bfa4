"""Log-probabilities of tokens under the model's own distribution, before temperature, top-k and top-p. In float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.models.token_text import TokenTextCache

CHUNK = 64  # positions that are converted to float64 at a time
MIN_LOGPROB = -9999.0  # in place of minus infinity, which JSON cannot represent


class TokenMeasurement(NamedTuple):
    """The log-probabilities at the position of one token."""

    log_p: float  #: of that token
    top_logprobs: list[tuple[int, float]]  #: the most probable tokens, in order


@torch.inference_mode()
def measure_logprobs(logits: Tensor, tokens: Tensor, top: int) -> list[TokenMeasurement]:
    """Return the measurements of tokens (n,) from their logits (n, V). Waits for the device once in CHUNK positions."""
    measurements: list[TokenMeasurement] = []
    top = min(top, logits.shape[1])
    for start in range(0, len(tokens), CHUNK):
        chunk_tokens = tokens[start : start + CHUNK]
        log_p = logits[start : start + CHUNK].double().log_softmax(-1).clamp(min=MIN_LOGPROB)
        best, ids = log_p.topk(top)
        rows = torch.cat(
            [log_p.gather(1, chunk_tokens.clamp(min=0)[:, None]), best, ids.double()], 1
        ).tolist()
        for own_log_p, *rest in rows:
            measurements.append(
                TokenMeasurement(
                    own_log_p, [(int(i), p) for p, i in zip(rest[:top], rest[top:], strict=True)]
                )
            )
    return measurements


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probabilities of one token, as reported. The first token of a text has none."""

    token: str
    log_p: float | None
    top_logprobs: dict[str, float] | None  #: by token text, the token itself included
    text_offset: int  #: the character of the text at which the token begins


def to_openai(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the entries in the format of OpenAI's completions."""
    return {
        "tokens": [line.token for line in entries],
        "token_logprobs": [line.log_p for line in entries],
        "top_logprobs": [line.top_logprobs for line in entries],
        "text_offset": [line.text_offset for line in entries],
    }


class LogprobRecorder:
    """The log-probabilities of one sequence: of its prompt, if echoed, and of its output."""

    def __init__(self, spelling: TokenTextCache, top: int, prompt: Sequence[tuple[int, int]] = ()) -> None:
        """`prompt`: its tokens and the characters at which they begin; empty if it is not echoed."""
        self.top = top
        self._spelling = spelling
        self._prompt = list(prompt)
        self._entries: list[TokenLogprob] = []
        self._sent_count = 0

    @property
    def unmeasured_prompt(self) -> list[int]:
        """The tokens of the prompt until they have been measured."""
        return [] if self._entries else [token for token, _ in self._prompt]

    def record_prompt(self, measurements: Sequence[TokenMeasurement]) -> None:
        """Record the measurements of all tokens of the prompt but the first."""
        (first, text_offset), *rest = self._prompt
        self._entries.append(TokenLogprob(self._spelling(first), None, None, text_offset))
        for (token, text_offset), measurement in zip(rest, measurements, strict=True):
            self.record(token, text_offset, measurement)

    def record(self, token: int, text_offset: int, measurement: TokenMeasurement) -> None:
        """Record one token of the output."""
        top_logprobs: dict[str, float] = {}
        for other, log_p in measurement.top_logprobs[: self.top]:
            top_logprobs.setdefault(
                self._spelling(other), log_p
            )  # of two with the same text the more probable one
        top_logprobs.setdefault(self._spelling(token), measurement.log_p)
        self._entries.append(
            TokenLogprob(self._spelling(token), measurement.log_p, top_logprobs, text_offset)
        )

    def until(self, end_offset: float) -> list[TokenLogprob]:
        """Return the entries of the tokens that begin before this character."""
        return [line for line in self._entries if line.text_offset < end_offset]

    def unsent(self, end_offset: float) -> list[TokenLogprob]:
        """Return those of the entries until `end_offset` that have not been returned before."""
        entries = self.until(end_offset)[self._sent_count :]
        self._sent_count += len(entries)
        return entries
