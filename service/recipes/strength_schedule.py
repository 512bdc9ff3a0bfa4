"""Which strengths an edit is tried with, as a function of the number of active edits. Torch-free.

Keys of width D give room for about D independent edits. With few active edits an edit is written at full strength. As
the fullness (active edits / D) grows, weaker edits leave more capacity to the others, so that the schedule starts
with partial strengths. docs/decisions/0010-strength-by-room.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from service.methods.parameters import Parameters


@dataclass(frozen=True)
class StrengthSchedule:
    """The strengths that an edit is tried with, in order, and the margins that it must reach."""

    strengths: tuple[float, ...]
    partial_strength_margin: float  #: nats, below full strength
    full_strength_margin: float  #: nats, from full strength on

    def required_margin(self, strength: float) -> float:
        """Return the margin, in nats of mean log-probability, at which an edit of this strength is raised no
        further."""
        return self.full_strength_margin if strength >= 1 else self.partial_strength_margin


def strength_schedule(
    parameters: Parameters, strengths: Sequence[float], active_edits: int, key_width: int
) -> StrengthSchedule:
    """Return the schedule when `active_edits` edits will be active, this one included, with keys of width D.

    Fullness below the first pair of `required_margins`: only full strength and above. Fullness above the last of
    several pairs: at most full strength, because more would cost the other edits more than this one gains. Without
    pairs: all strengths, `margin`.
    """
    pairs, margin, fullness = parameters.required_margins, parameters.margin, active_edits / key_width
    if not pairs:
        return StrengthSchedule(tuple(strengths), margin, margin)
    required = max(_interpolate(pairs, fullness), margin)
    at_least_full, at_most_full = tuple(s for s in strengths if s >= 1), tuple(s for s in strengths if s <= 1)
    if at_least_full and fullness < pairs[0][0]:
        return StrengthSchedule(at_least_full, margin, margin)
    if at_most_full and len(pairs) > 1 and fullness > pairs[-1][0]:
        return StrengthSchedule(at_most_full, required, margin)
    return StrengthSchedule(tuple(strengths), required, margin)


def _interpolate(points: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate linearly between points with increasing x; constant outside them."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * max(0.0, x - x0) / (x1 - x0)
    return points[-1][1]
