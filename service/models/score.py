"""How probable an object was found to be. Free of torch, unlike `scoring`, which finds it."""

from __future__ import annotations

from typing import NamedTuple


class TargetScore(NamedTuple):
    """How probable an object is after a prompt, its own tokens before each token given."""

    log_p: float  #: mean over its tokens
    is_greedy: bool  #: it is the greedy continuation
    correct_tokens: int  #: how many of its tokens are the most probable ones
    num_tokens: int
