"""The score of an object. This module does not import torch; `scoring` computes the scores."""

from __future__ import annotations

from typing import NamedTuple


class TargetScore(NamedTuple):
    """Probability of an object after a prompt, teacher forced."""

    log_p: float  #: mean log-probability of its tokens, in nats
    is_greedy: bool  #: it is the greedy continuation
    correct_tokens: int  #: number of its tokens that are the argmax
    num_tokens: int
