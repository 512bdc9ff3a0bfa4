"""Effects of many traces, averaged by the role of a token in its prompt (Meng et al. 2022, Section 2.2).

A trace is given as its JSON. Subject tokens are [b, e) of T:

    first b        middle b+1 .. e-2        last e-1        first subsequent e        further e+1 .. T-2        last
    token T-1

The AIE of a row and layer is the mean of score - low over all tokens of the row in all prompts, each with its own
prompt's low. The ATE is the mean of high minus the mean of low. Intervals resample whole prompts. As published, a
token counts in two rows if the subject has one token, if the prompt ends right after the token that follows the
subject, or if it ends with the subject. The number of such prompts is reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.errors import InvalidInput
from service.kit.text import Span
from service.scores.scores import BOOTSTRAP_ROUNDS, bootstrap_counts
from service.studies.bootstrap import Array, cluster_mean_with_interval, mean_with_interval, pooled_means

TraceJson = Mapping[str, Any]

TOKEN_ROWS = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
LAST_SUBJECT, LAST = TOKEN_ROWS[2], TOKEN_ROWS[5]
#: the severed paths whose loss, ordinary - severed, is averaged over the same prompts
SEVERED_PATHS = ("mlp", "attn")


def token_positions(subject: Span, length: int) -> dict[str, range]:
    """Return the tokens of each row in a prompt of `length` tokens."""
    b, e = subject
    tokens = (
        range(b, b + 1),
        range(b + 1, e - 1),
        range(e - 1, e),
        range(e, min(e + 1, length)),
        range(e + 1, length - 1),
        range(length - 1, length),
    )
    return dict(zip(TOKEN_ROWS, tokens, strict=True))


def indirect_effects(trace: TraceJson, kind: str) -> Array:
    """Return score - low (T, L)."""
    scores: Array = np.asarray(trace["kinds"][kind]["scores"], dtype=np.float64)
    return scores - float(trace["low"])


def average_traces(
    traces: Sequence[TraceJson], rounds: int = BOOTSTRAP_ROUNDS, seed: int = 0
) -> dict[str, Any]:
    """Return the averages of traces with equal settings:

    `total_effect`, `kinds` by row and layer, `severed` by layer.
    """
    if not traces:
        raise InvalidInput("there is no trace to average: the model knows none of the facts.", "facts")
    resample_counts = bootstrap_counts(len(traces), rounds, seed)
    positions = [token_positions(tuple(t["subject"]["tokens"]), len(t["tokens"])) for t in traces]
    high, low = ([t[end] for t in traces] for end in ("high", "low"))
    return {
        "facts": len(traces),
        "layers": len(next(iter(traces[0]["kinds"].values()))["scores"][0]),
        "high": mean_with_interval(high, resample_counts),
        "low": mean_with_interval(low, resample_counts),
        "total_effect": mean_with_interval(np.subtract(high, low), resample_counts),
        "coinciding_rows": count_coinciding_rows(traces),
        "kinds": {
            kind: _average_kind(traces, positions, kind, resample_counts) for kind in traces[0]["kinds"]
        },
        "severed": severed_effects(traces, resample_counts) if traces[0]["severed"] else None,
    }


def count_coinciding_rows(traces: Sequence[TraceJson]) -> dict[str, int]:
    """Return the number of prompts in which two rows are the same token."""
    spans = [(*t["subject"]["tokens"], len(t["tokens"])) for t in traces]
    return {
        "first and last subject token": sum(e - b == 1 for b, e, _ in spans),
        "first subsequent and last token": sum(e == length - 1 for _, e, length in spans),
        "last subject and last token": sum(e == length for _, e, length in spans),
    }


def _average_kind(
    traces: Sequence[TraceJson], positions: Sequence[Mapping[str, range]], kind: str, resample_counts: Array
) -> dict[str, Any]:
    trace_effects = [indirect_effects(t, kind) for t in traces]
    return {
        row: _average_row(trace_effects, [w[row] for w in positions], resample_counts) for row in TOKEN_ROWS
    }


def _average_row(
    trace_effects: Sequence[Array], tokens: Sequence[range], resample_counts: Array
) -> dict[str, Any]:
    """Return one row of a map: the mean by layer with its interval, and its peak."""
    sums = np.stack(
        [effect[list(positions)].sum(0) for effect, positions in zip(trace_effects, tokens, strict=True)]
    )  # (n, L)
    counts = np.asarray([len(positions) for positions in tokens], dtype=np.float64)
    row = cluster_mean_with_interval(sums, counts, resample_counts) | {
        "tokens": int(counts.sum()),
        "peak": None,
    }
    if row["n"]:
        row["peak"] = _peak(row, pooled_means(resample_counts, sums, counts))
    return row


def _peak(row: Mapping[str, Any], resampled_means: Array) -> dict[str, Any]:
    """Return the layer of the greatest mean; `layers` is its 90 % interval over resamples."""
    layer = int(np.argmax(row["mean"]))
    complete = resampled_means[~np.isnan(resampled_means).any(1)]
    ends = np.quantile(complete.argmax(1), [0.05, 0.95], method="nearest") if row["n"] > 1 else None
    return {
        "layer": layer,
        "mean": row["mean"][layer],
        "low": row["low"] and row["low"][layer],
        "high": row["high"] and row["high"][layer],
        "layers": None if ends is None else [int(x) for x in ends],
    }


def severed_effects(traces: Sequence[TraceJson], resample_counts: Array) -> dict[str, Any]:
    """Return the effect at the subject's last token by layer, with each path severed or not, and the paired loss."""
    paths = {
        path: np.stack([np.subtract(t["severed"]["scores"][path], t["low"]) for t in traces])
        for path in traces[0]["severed"]["scores"]
    }
    losses = {
        path: mean_with_interval(paths["none"] - paths[path], resample_counts) for path in SEVERED_PATHS
    }
    return {
        "paths": {path: mean_with_interval(rows, resample_counts) for path, rows in paths.items()},
        "lost": losses,
    }
