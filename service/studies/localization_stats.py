"""What many edits at every layer say about tracing: success by layer, effect by layer, and the one by the other (methods F).

Pure: takes what the runs stored. scores and effects are (facts, layers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.scores.scores import draws
from service.studies.bootstrap import Array, mean_of
from service.studies.regression import compare

#: the scores of an edit, by what is asked
MEASURES = ("rewrite", "paraphrase", "neighbour")
#: the tracing effect of a fact at a layer: the greatest over its tokens, or that of the subject's last
EFFECTS = ("greatest over tokens", "last subject token")


def fractions(trace: Mapping[str, Any], kind: str = "mlp") -> Array:
    """(T, L): how much of what the noise took comes back, max(0, (score - low) / |low - high|) (methods F.3)."""
    scores: Array = np.asarray(trace["kinds"][kind]["scores"], dtype=np.float64)
    taken = abs(float(trace["low"]) - float(trace["high"]))
    if taken == 0:
        return np.zeros_like(scores)
    return np.maximum(0.0, (scores - float(trace["low"])) / taken)


def effects_of(trace: Mapping[str, Any]) -> dict[str, list[float]]:
    """The tracing effect at every layer, in both readings; tokens count from the subject's first on."""
    b, e = trace["subject"]["tokens"]
    found = fractions(trace)
    rows = (found[b:].max(0), found[e - 1])
    return {name: row.tolist() for name, row in zip(EFFECTS, rows, strict=True)}


def by_layer(effects: Sequence[Mapping[str, list[float]]]) -> dict[str, Any]:
    """The mean effect by layer with its interval, in each reading."""
    drawn = draws(len(effects))
    return {name: mean_of([e[name] for e in effects], drawn) for name in EFFECTS}


def conclude(
    runs: Sequence[Sequence[Mapping[str, float | None]]],
    effects: Sequence[Mapping[str, list[float]]],
    layers: Sequence[int],
) -> dict[str, Any]:
    """Of one method and objective: runs[fact][layer] is an edit's scores, `effects` those of the same facts at all layers."""
    found: dict[str, Any] = {}
    for measure in MEASURES:
        rows = [i for i, of_fact in enumerate(runs) if all(run[measure] is not None for run in of_fact)]
        if not rows:
            found[measure] = None  # no fact has a prompt for it
            continue
        scores = np.asarray([[run[measure] for run in runs[i]] for i in rows], dtype=np.float64)
        traced = {name: np.asarray([effects[i][name] for i in rows])[:, list(layers)] for name in EFFECTS}
        found[measure] = {
            "by_layer": mean_of(scores, draws(len(rows))),
            "regression": {name: compare(scores, effect) for name, effect in traced.items()},
            "choice": choice(scores, traced[EFFECTS[0]], layers),
        }
    return found


def choice(scores: Array, effects: Array, layers: Sequence[int]) -> dict[str, Any] | None:
    """The mean score of three ways to choose a layer: the one that is best for all other facts, the one where the fact's own
    tracing effect is greatest, and any. And what following the trace gains over the first, paired. None for one fact alone."""
    if len(scores) < 2:
        return None
    facts = np.arange(len(scores))
    others = (scores.sum(0) - scores) / (len(scores) - 1)
    ways = {
        "best for others": scores[facts, others.argmax(1)],
        "where the trace is strongest": scores[facts, effects.argmax(1)],
        "any": scores.mean(1),
    }
    drawn = draws(len(scores))
    means = {name: mean_of(values, drawn) for name, values in ways.items()}
    gained = ways["where the trace is strongest"] - ways["best for others"]
    return {
        "best_layer": int(layers[int(scores.mean(0).argmax())]),
        "ways": means,
        "gained": mean_of(gained, drawn),
    }
