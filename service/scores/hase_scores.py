"""The share of the possible change that an edit makes (Hase et al. 2023, Section 5), as pure functions.

Probabilities are those of whole objects: exp of the sum of log p over their tokens, before and after the edit.
"""

from __future__ import annotations

MIN_REWRITE_SHARE = 2e-8  # lower bound of the rewrite score in the authors' code


def rewrite_share(before: float, after: float) -> float:
    """Return the share of the possible increase of p, 1 - (1 - p') / (1 - p). It is 1 if p was and remains 1."""
    if before >= 1:
        return 1.0 if after >= 1 else MIN_REWRITE_SHARE
    return max(MIN_REWRITE_SHARE, 1 - (1 - after) / (1 - before))


def erasure_share(before: float, after: float) -> float:
    """Return the share by which p decreased, (p - p') / p. It is 0 if p was 0."""
    return max(0.0, (before - after) / before) if before > 0 else 0.0


def preserved_share(before: float, after: float) -> float:
    """Return 1 minus the change of p as a share of the greatest possible change: 1 - |p' - p| / (|p - 1/2| + 1/2)."""
    return 1 - abs(after - before) / (abs(before - 0.5) + 0.5)
