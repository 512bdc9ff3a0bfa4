"""What many edits at every layer say about tracing: success by layer, effect by layer, and the one by the other (methods F).

Pure: takes what the runs stored. scores and effects are (facts, layers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.scores.scores import bootstrap_counts
from service.studies.bootstrap import Array, mean_with_interval
from service.studies.regression import compare_regressions

#: the scores of an edit, by what is asked
EDIT_SCORES = ("rewrite", "paraphrase", "neighbour")
#: the tracing effect of a fact at a layer: the greatest over its tokens, or that of the subject's last
EFFECT_READINGS = ("greatest over tokens", "last subject token")


def restored_fractions(trace: Mapping[str, Any], kind: str = "mlp") -> Array:
    """(T, L): how much of what the noise took comes back, max(0, (score - low) / |low - high|) (methods F.3)."""
    scores: Array = np.asarray(trace["kinds"][kind]["scores"], dtype=np.float64)
    total_effect = abs(float(trace["low"]) - float(trace["high"]))
    if total_effect == 0:
        return np.zeros_like(scores)
    return np.maximum(0.0, (scores - float(trace["low"])) / total_effect)


def trace_effects(trace: Mapping[str, Any]) -> dict[str, list[float]]:
    """The tracing effect at every layer, in both readings; tokens count from the subject's first on."""
    b, e = trace["subject"]["tokens"]
    fractions_restored = restored_fractions(trace)
    rows = (fractions_restored[b:].max(0), fractions_restored[e - 1])
    return {name: row.tolist() for name, row in zip(EFFECT_READINGS, rows, strict=True)}


def mean_effects_by_layer(effects: Sequence[Mapping[str, list[float]]]) -> dict[str, Any]:
    """The mean effect by layer with its interval, in each reading."""
    resample_counts = bootstrap_counts(len(effects))
    return {name: mean_with_interval([e[name] for e in effects], resample_counts) for name in EFFECT_READINGS}


def analyze_runs(
    runs: Sequence[Sequence[Mapping[str, float | None]]],
    effects: Sequence[Mapping[str, list[float]]],
    layers: Sequence[int],
) -> dict[str, Any]:
    """Of one method and objective: runs[fact][layer] is an edit's scores, `effects` those of the same facts at all layers."""
    findings: dict[str, Any] = {}
    for measure in EDIT_SCORES:
        rows = [i for i, fact_runs in enumerate(runs) if all(run[measure] is not None for run in fact_runs)]
        if not rows:
            findings[measure] = None  # no fact has a prompt for it
            continue
        scores = np.asarray([[run[measure] for run in runs[i]] for i in rows], dtype=np.float64)
        selected_effects = {
            name: np.asarray([effects[i][name] for i in rows])[:, list(layers)] for name in EFFECT_READINGS
        }
        findings[measure] = {
            "by_layer": mean_with_interval(scores, bootstrap_counts(len(rows))),
            "regression": {
                name: compare_regressions(scores, effect) for name, effect in selected_effects.items()
            },
            "choice": compare_layer_choices(scores, selected_effects[EFFECT_READINGS[0]], layers),
        }
    return findings


def compare_layer_choices(scores: Array, effects: Array, layers: Sequence[int]) -> dict[str, Any] | None:
    """The mean score of three ways to choose a layer: the one that is best for all other facts, the one where the fact's own
    tracing effect is greatest, and any. And what following the trace gains over the first, paired. None for one fact alone."""
    if len(scores) < 2:
        return None
    facts = np.arange(len(scores))
    others = (scores.sum(0) - scores) / (len(scores) - 1)
    strategies = {
        "best for others": scores[facts, others.argmax(1)],
        "where the trace is strongest": scores[facts, effects.argmax(1)],
        "any": scores.mean(1),
    }
    resample_counts = bootstrap_counts(len(scores))
    means = {name: mean_with_interval(values, resample_counts) for name, values in strategies.items()}
    gains = strategies["where the trace is strongest"] - strategies["best for others"]
    return {
        "best_layer": int(layers[int(scores.mean(0).argmax())]),
        "ways": means,
        "gained": mean_with_interval(gains, resample_counts),
    }
