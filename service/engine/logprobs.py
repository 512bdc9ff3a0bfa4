"""How probable a model finds the tokens of a text: by its own distribution, before temperature and cuts. In float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.models.token_text import Spelling

CHUNK = 64  # places whose distributions are widened at a time
LEAST = -9999.0  # in place of minus infinity, which JSON cannot say


class Measured(NamedTuple):
    """What the model's distribution says where a token stands."""

    log_p: float  #: of that token
    best: list[tuple[int, float]]  #: the most probable tokens, in order


@torch.inference_mode()
def measure(logits: Tensor, tokens: Tensor, top: int) -> list[Measured]:
    """For logits (n, V) and the tokens (n,) that stand there. Waits for the device once in CHUNK places."""
    found: list[Measured] = []
    top = min(top, logits.shape[1])
    for at in range(0, len(tokens), CHUNK):
        there = tokens[at : at + CHUNK]
        log_p = logits[at : at + CHUNK].double().log_softmax(-1).clamp(min=LEAST)
        best, ids = log_p.topk(top)
        rows = torch.cat([log_p.gather(1, there.clamp(min=0)[:, None]), best, ids.double()], 1).tolist()
        for own, *rest in rows:
            found.append(Measured(own, [(int(i), p) for p, i in zip(rest[:top], rest[top:], strict=True)]))
    return found


@dataclass(frozen=True)
class Line:
    """A token as it is told. The first one of a text has nothing before it, and no probability."""

    token: str
    log_p: float | None
    best: dict[str, float] | None  #: by spelling, the token itself among them
    at: int  #: the character of the text at which it begins


def columns(lines: Sequence[Line]) -> dict[str, Any]:
    """Lines in the form of OpenAI's completions."""
    return {
        "tokens": [line.token for line in lines],
        "token_logprobs": [line.log_p for line in lines],
        "top_logprobs": [line.best for line in lines],
        "text_offset": [line.at for line in lines],
    }


class Report:
    """The lines of one row: of its prompt, where that is echoed, and of its answer."""

    def __init__(self, spelling: Spelling, top: int, prompt: Sequence[tuple[int, int]] = ()) -> None:
        """`prompt`: its tokens and the characters at which they begin; none where it is not echoed."""
        self.top = top
        self._spelling = spelling
        self._prompt = list(prompt)
        self._lines: list[Line] = []
        self._told = 0

    @property
    def lacks(self) -> list[int]:
        """The tokens of the prompt, as long as they are to be measured."""
        return [] if self._lines else [token for token, _ in self._prompt]

    def take_prompt(self, measured: Sequence[Measured]) -> None:
        """What was found of all tokens of the prompt but the first."""
        (first, at), *rest = self._prompt
        self._lines.append(Line(self._spelling(first), None, None, at))
        for (token, at), found in zip(rest, measured, strict=True):
            self.take(token, at, found)

    def take(self, token: int, at: int, found: Measured) -> None:
        """One more token of the answer."""
        best: dict[str, float] = {}
        for other, log_p in found.best[: self.top]:
            best.setdefault(
                self._spelling(other), log_p
            )  # of two that are spelled alike the more probable one
        best.setdefault(self._spelling(token), found.log_p)
        self._lines.append(Line(self._spelling(token), found.log_p, best, at))

    def before(self, reach: float) -> list[Line]:
        """The lines of the tokens that begin before this character."""
        return [line for line in self._lines if line.at < reach]

    def news(self, reach: float) -> list[Line]:
        """Of these the ones that were not told before."""
        lines = self.before(reach)[self._told :]
        self._told += len(lines)
        return lines
