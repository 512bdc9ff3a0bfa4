"""Results of probes with objects of one token."""

from __future__ import annotations

from service.editing.probes import ProbeResult
from service.models.score import DecisiveScore


def probe_result(new: float, true: float, new_is_greedy: bool, true_is_greedy: bool) -> ProbeResult:
    """Return the result of a probe from the log-probabilities of its objects."""
    decisive = DecisiveScore(new, new), DecisiveScore(true, true)
    return ProbeResult(new, true, new_is_greedy, true_is_greedy, *decisive)
