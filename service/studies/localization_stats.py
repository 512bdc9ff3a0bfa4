"""Statistics of the localization study: edit success by layer, tracing effect by layer, and their relation (Hase et
al. 2023).

Pure functions of stored runs. scores and effects are (facts, layers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.scores.scores import bootstrap_counts
from service.studies.bootstrap import Array, mean_with_interval
from service.studies.regression import compare_regressions

#: the change scores of an edit
EDIT_SCORES = ("rewrite", "paraphrase", "neighbour")
#: readings of a fact's tracing effect at a layer: the greatest over tokens, and that at the subject's last token
EFFECT_READINGS = ("greatest over tokens", "last subject token")
#: the ways to choose a layer
BEST_FOR_OTHERS, STRONGEST_TRACE, RANDOM_LAYER = "best_for_others", "strongest_trace", "random"


def restored_fractions(trace: Mapping[str, Any], kind: str = "mlp") -> Array:
    """Return the restored share of the total effect (T, L): max(0, (score - low) / |low - high|)."""
    scores: Array = np.asarray(trace["kinds"][kind]["scores"], dtype=np.float64)
    total_effect = abs(float(trace["low"]) - float(trace["high"]))
    if total_effect == 0:
        return np.zeros_like(scores)
    return np.maximum(0.0, (scores - float(trace["low"])) / total_effect)


def trace_effects(trace: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the tracing effect at every layer in both readings, over the tokens from the subject's first on."""
    b, e = trace["subject"]["tokens"]
    fractions_restored = restored_fractions(trace)
    rows = (fractions_restored[b:].max(0), fractions_restored[e - 1])
    return {name: row.tolist() for name, row in zip(EFFECT_READINGS, rows, strict=True)}


def mean_effects_by_layer(effects: Sequence[Mapping[str, list[float]]]) -> dict[str, Any]:
    """Return the mean effect by layer with its interval in each reading."""
    resample_counts = bootstrap_counts(len(effects))
    return {name: mean_with_interval([e[name] for e in effects], resample_counts) for name in EFFECT_READINGS}


def analyze_runs(
    runs: Sequence[Sequence[Mapping[str, float | None]]],
    effects: Sequence[Mapping[str, list[float]]],
    layers: Sequence[int],
) -> dict[str, Any]:
    """Return the statistics of one method and objective.

    runs[fact][layer] are the change scores of an edit, `effects` the tracing effects of the same facts at all layers.
    """
    findings: dict[str, Any] = {}
    for measure in EDIT_SCORES:
        rows = [i for i, fact_runs in enumerate(runs) if all(run[measure] is not None for run in fact_runs)]
        if not rows:
            findings[measure] = None  # no fact has prompts for this score
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
    """Return the mean score of three ways to choose a layer, and the paired gain of the second over the first.

    The ways are: the layer that is best for all other facts, the layer of the fact's greatest tracing effect, and a
    random layer. None for a single fact.
    """
    if len(scores) < 2:
        return None
    facts = np.arange(len(scores))
    others = (scores.sum(0) - scores) / (len(scores) - 1)
    strategies = {
        BEST_FOR_OTHERS: scores[facts, others.argmax(1)],
        STRONGEST_TRACE: scores[facts, effects.argmax(1)],
        RANDOM_LAYER: scores.mean(1),
    }
    resample_counts = bootstrap_counts(len(scores))
    means = {name: mean_with_interval(values, resample_counts) for name, values in strategies.items()}
    gains = strategies[STRONGEST_TRACE] - strategies[BEST_FOR_OTHERS]
    return {
        "best_layer": int(layers[int(scores.mean(0).argmax())]),
        "ways": means,
        "gain": mean_with_interval(gains, resample_counts),
    }
