"""The score of an object. This module does not import torch; `scoring` computes the scores."""

from __future__ import annotations

import math
from typing import NamedTuple


class TokenScore(NamedTuple):
    """Probability of one token of an object after the prompt and the tokens before it."""

    id: int
    log_p: float
    is_greedy: bool


class TargetScore(NamedTuple):
    """Probability of an object after a prompt, teacher forced."""

    log_p: float  #: mean log-probability of its tokens, in nats
    is_greedy: bool  #: it is the greedy continuation
    correct_tokens: int  #: number of its tokens that are the argmax
    num_tokens: int
    tokens: tuple[TokenScore, ...] = ()  #: each token; empty in scores that were stored

    def figures(self) -> tuple[float, bool, int, int]:
        """Return what is stored of a score."""
        return self[:4]


class DecisiveScore(NamedTuple):
    """An object against another one after the same prompt: what decides whether the model says the one or the other.

    Tokens after the first that differs say nothing about that. Many tokens that are certain after the first, as in a
    long object or in one of byte tokens, make the mean per token high although the object is improbable.
    """

    #: joint log-probability of the tokens up to and including the first in which both objects differ
    lead: float
    #: the same where the model completes the object by greedy tokens; otherwise that of the whole object
    said: float


def decisive_scores(one: TargetScore, other: TargetScore) -> tuple[DecisiveScore, DecisiveScore]:
    """Return the decisive scores of two objects. Of equal objects the whole object decides."""
    common = 0
    for a, b in zip(one.tokens, other.tokens, strict=False):
        if a.id != b.id:
            break
        common += 1
    return _decisive(one, other, common), _decisive(other, one, common)


def _decisive(score: TargetScore, other: TargetScore, common: int) -> DecisiveScore:
    """Return the decisive score of an object that has the first `common` tokens of the other one."""
    whole = sum(t.log_p for t in score.tokens)
    if common == len(
        score.tokens
    ):  # the other object goes on where this one ends: all other continuations are this one
        continued = sum(t.log_p for t in other.tokens[: common + 1])
        lead = whole if common == len(other.tokens) else _log_difference(whole, continued)
        return DecisiveScore(lead, lead)
    lead = sum(t.log_p for t in score.tokens[: common + 1])
    is_completed = all(t.is_greedy for t in score.tokens[common + 1 :])
    return DecisiveScore(lead, lead if is_completed else whole)


def _log_difference(a: float, b: float) -> float:
    """Return log(exp(a) - exp(b)) for b <= a."""
    return a + math.log1p(-math.exp(b - a)) if b < a else -math.inf
