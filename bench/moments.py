"""How many tokens of text are enough for C = E[k k^T]: what edits are worth against the tokens they were computed from.

    python bench/moments.py
    python bench/moments.py --cases 200 --together 100 --tokens 250 500 1000 2000 4000 8000 16000 32000 60000
    python bench/moments.py --device cuda

Texts of the model's own corpus are read in one seeded order, so that C of n tokens is made of the first n. An edit's value
does not depend on C: it is found once, and each C gives it another direction. So the same edits are measured with every C, on
cases held out from the tuning of the recipe: each alone (strengthened as the service does), and many of different
subjects active together, each as strong as found.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from bench.editing import Lab, Shares
from bench.harness import Report, synchroniser
from service.covariance.collect import DAMPING, batches_of, keys_of, rows_of
from service.covariance.corpus import Corpus
from service.covariance.second_moment import MomentSum, Statistics
from service.datasets.records import Record, read_records
from service.models.hooks import capture, stop_after
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad
from service.scores.scores import bootstrap_score
from service.settings import SHIPPED_MODEL
from service.weights.composition import Association

STRENGTHS = (1.0, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class Collected:
    """C of one layer over the first texts of an order."""

    moment: Tensor
    count: int
    padded: int  #: tokens that were read, padding included
    seconds: float

    def statistics(self, layer: int) -> Statistics:
        return Statistics(layer, self.moment, self.count, DAMPING, str(self.count))


def collect(model: LoadedModel, layer: int, texts: Sequence[str], sizes: Sequence[int]) -> list[Collected]:
    """C at each of the sizes, in one reading: the batches of a larger one go on where the smaller one ended."""
    wait = synchroniser(str(model.device))
    rows = rows_of(model, Corpus("bench", tuple(texts)))
    total = MomentSum(model.inner_width, model.device)
    found, padded, seconds, at = [], 0, 0.0, 0
    for size in sorted(sizes):
        begin, count = at, total.count
        while at < len(rows) and count < size:
            count += len(rows[at])
            at += 1
        wait()
        began = time.perf_counter()
        for some in batches_of(rows[begin:at]):
            batch = pad(some, model)
            with capture({0: model.down(layer)}, "input") as seen, stop_after(model.down(layer)):
                forward(model, batch)
            total.add(keys_of(seen[0], batch))
            padded += batch.ids.numel()
        wait()
        seconds += time.perf_counter() - began
        if not found or total.count > found[-1].count:
            found.append(Collected(total.mean(), total.count, padded, seconds))
    return found


def single(lab: Lab, cases: Sequence[Record], edits: Sequence[Sequence[Association]]) -> list[Shares]:
    """Each alone on the base model, made stronger until it takes."""
    records = []
    for case, edit in zip(cases, edits, strict=True):
        for strength in STRENGTHS:
            record = lab.measure([case], lab.replica.composed(a.scaled(strength) for a in edit))[0]
            if record[0] == 1.0:
                break
        records.append(record)
    return records


def together(lab: Lab, cases: Sequence[Record], edits: Sequence[Sequence[Association]]) -> list[Shares]:
    return lab.measure(cases, lab.replica.composed(a for edit in edits for a in edit))


def scores(records: Sequence[Shares]) -> list[str]:
    """ES, PS, NS, and S with its interval, in per cent."""
    columns = ([x for x in column if not math.isnan(x)] for column in zip(*records, strict=True))
    means = [100 * sum(c) / max(1, len(c)) for c in columns]
    whole = [r for r in records if not any(map(math.isnan, r))]
    score, low, high = (100 * x for x in bootstrap_score(whole))
    return [" / ".join(f"{m:.1f}" for m in means), f"{score:.1f} ({low:.1f} to {high:.1f})"]


def turned(edits: Sequence[Sequence[Association]], statistics: Statistics) -> list[list[Association]]:
    """The same edits with directions of other statistics."""
    return [[replace(a, direction=statistics.solve(a.key).float()) for a in edit] for edit in edits]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument("--data", type=Path, help="facts.jsonl or CounterFact JSON; the model's own when left out")
    p.add_argument("--device", default="cpu")
    p.add_argument("--cases", type=int, default=40, help="edits that are measured alone")
    p.add_argument(
        "--together", type=int, default=60, help="edits of different subjects that are active at once"
    )
    p.add_argument("--tokens", type=int, nargs="+", default=[250, 1000, 4000, 16000, 60000])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--hparams", default="{}", help="JSON to change the recipe with; one layer")
    args = p.parse_args()
    args.stats = None
    lab = Lab(args)
    model, (layer,) = lab.model, lab.parameters.layers
    if lab.parameters.compat:
        p.error("with the published form of the key an edit's value depends on C")
    texts = random.Random(args.seed).sample(lab.toolkit.corpus.texts, len(lab.toolkit.corpus.texts))
    collected = collect(model, layer, texts, args.tokens)

    cases = read_records(args.data or Path(args.model) / "facts.jsonl", args.seed)[1::2]
    alone = cases[: args.cases]
    many = list({c.subject: c for c in reversed(cases)}.values())[: args.together]
    found = {c: lab.find(c, f"{i:04}") for i, c in enumerate(dict.fromkeys([*alone, *many]))}

    report = Report("moments", args.device)
    all_of_them = collected[-1].moment
    rows = []
    for c in collected:
        statistics = c.statistics(layer)
        one = single(lab, alone, turned([found[x] for x in alone], statistics))
        every = together(lab, many, turned([found[x] for x in many], statistics))
        apart = float((c.moment - all_of_them).norm() / all_of_them.norm())
        rows.append([str(c.count), f"{apart:.3f}", *scores(one), *scores(every)])
    report.table(
        f"Edits of layer {layer} ({model.name}, D = {model.inner_width}) against the tokens behind C",
        (
            "tokens",
            "C apart",
            f"{len(alone)} alone: ES / PS / NS",
            "S, 95 %",
            f"{len(many)} together: ES / PS / NS",
            "S, 95 %",
        ),
        rows,
    )
    report.table(
        "Collecting C, for one layer",
        ("tokens", "seconds", "tokens/s", "padding"),
        [
            [str(c.count), f"{c.seconds:.2f}", f"{c.count / c.seconds:.0f}", f"{1 - c.count / c.padded:.2%}"]
            for c in collected
        ],
    )
    batches = batches_of(rows_of(model, lab.toolkit.corpus))
    padded = sum(len(b) * max(map(len, b)) for b in batches)
    share = 1 - sum(len(row) for b in batches for row in b) / padded
    report.note(
        f"Batched together, as the service does, {share:.2%} of what is read of the whole corpus is padding."
    )
    report.note(
        "'C apart' is |C_n - C| / |C| in Frobenius norm, C being that of the most tokens; below about D tokens C is singular "
        "without its damping. Here the rows between two sizes are batched apart, so that their padding is larger."
    )
    report.note(json.dumps({"parameters": lab.parameters.model_dump(mode="json")}))


if __name__ == "__main__":
    main()
