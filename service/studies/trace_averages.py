"""Effects of many traces, averaged by what a token is to its prompt (Meng et al. 2022, Section 2.2; methods B.2, B.3).

A trace is given as its JSON. Subject tokens are [b, e) of T:

    first b        middle b+1 .. e-2        last e-1        first subsequent e        further e+1 .. T-2        last token T-1

AIE of a row and layer: the mean, over all tokens of the row in all prompts, of score - low, each with its own prompt's low.
ATE: mean of high - mean of low. Intervals draw whole prompts again. As published, the one token of a one-token subject counts
as its first and as its last; a token right after the subject that ends the prompt counts as the first subsequent and as the
last; and so does a subject's last token where the subject ends the prompt. How many prompts are of each sort is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.errors import InvalidInput
from service.kit.text import Span
from service.scores.scores import ROUNDS, draws
from service.studies.bootstrap import Array, mean_of, of_clusters, pooled

Trace = Mapping[str, Any]

ROWS = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
LAST_SUBJECT, LAST = ROWS[2], ROWS[5]
#: what the severed paths are compared by: ordinary - severed, of the same prompts
LOST = ("mlp", "attn")


def places(subject: Span, length: int) -> dict[str, range]:
    """The tokens of each row in a prompt of `length` tokens."""
    b, e = subject
    tokens = (
        range(b, b + 1),
        range(b + 1, e - 1),
        range(e - 1, e),
        range(e, min(e + 1, length)),
        range(e + 1, length - 1),
        range(length - 1, length),
    )
    return dict(zip(ROWS, tokens, strict=True))


def effects(trace: Trace, kind: str) -> Array:
    """score - low (T, L)."""
    scores: Array = np.asarray(trace["kinds"][kind]["scores"], dtype=np.float64)
    return scores - float(trace["low"])


def average(traces: Sequence[Trace], rounds: int = ROUNDS, seed: int = 0) -> dict[str, Any]:
    """The averages of traces that were made alike: `total_effect`, `kinds` by row and layer, `severed` by layer."""
    if not traces:
        raise InvalidInput("there is no trace to average: none of the facts is known to the model.", "facts")
    drawn = draws(len(traces), rounds, seed)
    where = [places(tuple(t["subject"]["tokens"]), len(t["tokens"])) for t in traces]
    high, low = ([t[end] for t in traces] for end in ("high", "low"))
    return {
        "facts": len(traces),
        "layers": len(next(iter(traces[0]["kinds"].values()))["scores"][0]),
        "high": mean_of(high, drawn),
        "low": mean_of(low, drawn),
        "total_effect": mean_of(np.subtract(high, low), drawn),
        "alike": alike(traces),
        "kinds": {kind: _kind(traces, where, kind, drawn) for kind in traces[0]["kinds"]},
        "severed": severed(traces, drawn) if traces[0]["severed"] else None,
    }


def alike(traces: Sequence[Trace]) -> dict[str, int]:
    """In how many prompts two rows are the same token."""
    spans = [(*t["subject"]["tokens"], len(t["tokens"])) for t in traces]
    return {
        "first and last subject token": sum(e - b == 1 for b, e, _ in spans),
        "first subsequent and last token": sum(e == length - 1 for _, e, length in spans),
        "last subject and last token": sum(e == length for _, e, length in spans),
    }


def _kind(
    traces: Sequence[Trace], where: Sequence[Mapping[str, range]], kind: str, drawn: Array
) -> dict[str, Any]:
    found = [effects(t, kind) for t in traces]
    return {row: _row(found, [w[row] for w in where], drawn) for row in ROWS}


def _row(found: Sequence[Array], tokens: Sequence[range], drawn: Array) -> dict[str, Any]:
    """One row of a map: by layer the mean and its interval, and where it is greatest."""
    sums = np.stack([effect[list(at)].sum(0) for effect, at in zip(found, tokens, strict=True)])  # (n, L)
    counts = np.asarray([len(at) for at in tokens], dtype=np.float64)
    row = of_clusters(sums, counts, drawn) | {"tokens": int(counts.sum()), "peak": None}
    if row["n"]:
        row["peak"] = _peak(row, pooled(drawn, sums, counts))
    return row


def _peak(row: Mapping[str, Any], of_draws: Array) -> dict[str, Any]:
    """The layer of the greatest mean; `layers` is where it lies in nine of ten draws."""
    layer = int(np.argmax(row["mean"]))
    some = of_draws[~np.isnan(of_draws).any(1)]
    ends = np.quantile(some.argmax(1), [0.05, 0.95], method="nearest") if row["n"] > 1 else None
    return {
        "layer": layer,
        "mean": row["mean"][layer],
        "low": row["low"] and row["low"][layer],
        "high": row["high"] and row["high"][layer],
        "layers": None if ends is None else [int(x) for x in ends],
    }


def severed(traces: Sequence[Trace], drawn: Array) -> dict[str, Any]:
    """At the subject's last token, by layer: the effect with a path whole and cut, and what the cut loses (paired)."""
    paths = {
        path: np.stack([np.subtract(t["severed"]["scores"][path], t["low"]) for t in traces])
        for path in traces[0]["severed"]["scores"]
    }
    lost = {path: mean_of(paths["none"] - paths[path], drawn) for path in LOST}
    return {"paths": {path: mean_of(rows, drawn) for path, rows in paths.items()}, "lost": lost}
