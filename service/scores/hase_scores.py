"""How much of what was possible an edit did: the scores of Hase et al. 2023 (methods F.2), as pure functions.

p are joint probabilities of whole objects, exp of the sum over their tokens of log p, before and after the edit.
"""

from __future__ import annotations

MIN_REWRITE_SHARE = 2e-8  # the authors' floor of the rewrite score


def rewrite_share(before: float, after: float) -> float:
    """Of an edit that raises p: the fraction of the possible gain, 1 - (1 - p') / (1 - p). 1 when p was 1 and stays."""
    if before >= 1:
        return 1.0 if after >= 1 else MIN_REWRITE_SHARE
    return max(MIN_REWRITE_SHARE, 1 - (1 - after) / (1 - before))


def erasure_share(before: float, after: float) -> float:
    """Of an edit that lowers p: the fraction that is gone, (p - p') / p. 0 when nothing was there."""
    return max(0.0, (before - after) / before) if before > 0 else 0.0


def preserved_share(before: float, after: float) -> float:
    """Of a neighbour: 1 - |p' - p| / (|p - 1/2| + 1/2), 1 less the change as a fraction of the greatest possible one."""
    return 1 - abs(after - before) / (abs(before - 0.5) + 0.5)
