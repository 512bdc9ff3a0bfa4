"""Number of tokens that C = E[k k^T] needs: scores of edits by the number of tokens from which C is computed.

    python bench/covariance_tokens.py
    python bench/covariance_tokens.py --cases 200 --batch-size 100 \\
        --tokens 250 500 1000 2000 4000 8000 16000 32000 60000
    python bench/covariance_tokens.py --device cuda
    python bench/covariance_tokens.py --multiples 1 2 4 16 --cases 80 --model FOLDER --known --data counterfact.json \\
        --hparams '{"layers": [3], "contexts": 2, "learning_rate": 0.5, "steps": 20}'

Texts of the model's corpus are read in one seeded order, and C of n tokens uses the first n. The value of an
edit does not depend on C and is optimized once; each C gives another direction. The same edits are measured
with every C on cases held out from tuning: single edits with increasing strength until they take effect, and
many edits of different subjects active together at strength 1.
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

from bench.editing import EditingExperiment, SuccessRates
from bench.harness import Report, device_synchronizer
from service.covariance.collect import DAMPING, batch_by_length, tokenize_corpus, unpadded_keys
from service.covariance.corpus import Corpus
from service.covariance.second_moment import KeyStatistics, SecondMomentAccumulator
from service.datasets.loading import read_records
from service.datasets.record import Record
from service.kit.steps import run_to_completion
from service.models.hooks import capture, stop_after
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad
from service.scores.scores import bootstrap_score
from service.settings import SHIPPED_MODEL
from service.tuning.fact_selection import select_known_records
from service.weights.factors import Association

STRENGTHS = (1.0, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class MomentSnapshot:
    """C of one layer over the first texts."""

    moment: Tensor
    count: int
    padded_count: int  #: tokens of the batches, padding included
    seconds: float

    def statistics(self, layer: int) -> KeyStatistics:
        return KeyStatistics(layer, self.moment, self.count, DAMPING, str(self.count))


def collect_moments(
    model: LoadedModel, layer: int, texts: Sequence[str], sizes: Sequence[int]
) -> list[MomentSnapshot]:
    """Return C at each size, accumulated in one pass over the texts."""
    wait = device_synchronizer(str(model.device))
    rows = tokenize_corpus(model, Corpus("bench", tuple(texts)))
    total = SecondMomentAccumulator(model.intermediate_size, model.device)
    snapshots: list[MomentSnapshot] = []
    padded, seconds, end = 0, 0.0, 0
    for size in sorted(sizes):
        begin, count = end, total.count
        while end < len(rows) and count < size:
            count += len(rows[end])
            end += 1
        wait()
        began = time.perf_counter()
        for batch_rows in batch_by_length(rows[begin:end]):
            batch = pad(batch_rows, model)
            with (
                capture({0: model.down_proj(layer)}, "input") as captured_inputs,
                stop_after(model.down_proj(layer)),
            ):
                forward(model, batch)
            total.add(unpadded_keys(captured_inputs[0], batch))
            padded += batch.ids.numel()
        wait()
        seconds += time.perf_counter() - began
        if not snapshots or total.count > snapshots[-1].count:
            snapshots.append(MomentSnapshot(total.mean(), total.count, padded, seconds))
    return snapshots


def score_single(
    experiment: EditingExperiment, cases: Sequence[Record], edits: Sequence[Sequence[Association]]
) -> list[SuccessRates]:
    """Return the scores of each edit alone on the base model, at the first strength at which it takes effect."""
    records = []
    for case, edit in zip(cases, edits, strict=True):
        for strength in STRENGTHS:
            record = experiment.measure(
                [case], experiment.replica.compose_patch(a.scaled(strength) for a in edit)
            )[0]
            if record[0] == 1.0:
                break
        records.append(record)
    return records


def score_joint(
    experiment: EditingExperiment, cases: Sequence[Record], edits: Sequence[Sequence[Association]]
) -> list[SuccessRates]:
    return experiment.measure(cases, experiment.replica.compose_patch(a for edit in edits for a in edit))


def format_scores(records: Sequence[SuccessRates]) -> list[str]:
    """Return ES / PS / NS and S with its 95 % interval, in percent."""
    columns = ([x for x in column if not math.isnan(x)] for column in zip(*records, strict=True))
    means = [100 * sum(c) / max(1, len(c)) for c in columns]
    whole = [r for r in records if not any(map(math.isnan, r))]
    score, low, high = (100 * x for x in bootstrap_score(whole))
    return [" / ".join(f"{m:.1f}" for m in means), f"{score:.1f} ({low:.1f} to {high:.1f})"]


def with_statistics(
    edits: Sequence[Sequence[Association]], statistics: KeyStatistics
) -> list[list[Association]]:
    """Return the edits with the directions of other statistics."""
    return [[replace(a, direction=statistics.solve(a.key).float()) for a in edit] for edit in edits]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument("--data", type=Path, help="facts.jsonl or CounterFact JSON; the model's own when left out")
    p.add_argument("--device", default="cpu")
    p.add_argument("--cases", type=int, default=40, help="edits measured alone")
    p.add_argument("--batch-size", type=int, default=60, help="edits of different subjects active at once")
    p.add_argument("--tokens", type=int, nargs="+", default=[250, 1000, 4000, 16000, 60000])
    p.add_argument(
        "--multiples", type=float, nargs="+", help="tokens as multiples of D, in place of --tokens"
    )
    p.add_argument("--known", action="store_true", help="only cases whose true object the model answers")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--hparams", default="{}", help="JSON with changes of the recipe; one layer")
    args = p.parse_args()
    args.stats = None
    experiment = EditingExperiment(args, args.tokens, args.multiples)
    model, (layer,) = experiment.model, experiment.parameters.layers
    sizes = experiment.token_counts
    if experiment.parameters.compat:
        p.error("with a published form of the key, the value of an edit depends on C")
    texts = random.Random(args.seed).sample(
        experiment.editor.corpus.texts, len(experiment.editor.corpus.texts)
    )
    snapshots = collect_moments(model, layer, texts, sizes)

    cases = read_records(args.data or Path(args.model) / "facts.jsonl", args.seed)[1::2]
    if args.known:
        limit = max(args.cases, args.batch_size)
        cases = run_to_completion(select_known_records(model, cases, limit))
    single_cases = cases[: args.cases]
    joint_cases = list({c.subject: c for c in reversed(cases)}.values())[: args.batch_size]
    associations = {
        c: experiment.compute_associations(c, f"{i:04}")
        for i, c in enumerate(dict.fromkeys([*single_cases, *joint_cases]))
    }

    report = Report("covariance_tokens", args.device)
    full_moment = snapshots[-1].moment
    rows = []
    for c in snapshots:
        statistics = c.statistics(layer)
        single_rates = score_single(
            experiment, single_cases, with_statistics([associations[x] for x in single_cases], statistics)
        )
        joint_rates = score_joint(
            experiment, joint_cases, with_statistics([associations[x] for x in joint_cases], statistics)
        )
        relative_distance = float((c.moment - full_moment).norm() / full_moment.norm())
        rows.append(
            [
                str(c.count),
                f"{relative_distance:.3f}",
                *format_scores(single_rates),
                *format_scores(joint_rates),
            ]
        )
    report.add_table(
        f"Edits of layer {layer} ({model.name}, D = {model.intermediate_size}) by the tokens behind C",
        (
            "tokens",
            "distance of C",
            f"{len(single_cases)} alone: ES / PS / NS",
            "S, 95 %",
            f"{len(joint_cases)} joint: ES / PS / NS",
            "S, 95 %",
        ),
        rows,
    )
    report.add_table(
        "Collecting C, for one layer",
        ("tokens", "seconds", "tokens/s", "padding"),
        [
            [
                str(c.count),
                f"{c.seconds:.2f}",
                f"{c.count / c.seconds:.0f}",
                f"{1 - c.count / c.padded_count:.2%}",
            ]
            for c in snapshots
        ],
    )
    batches = batch_by_length(tokenize_corpus(model, experiment.editor.corpus))
    padded = sum(len(b) * max(map(len, b)) for b in batches)
    share = 1 - sum(len(row) for b in batches for row in b) / padded
    report.add_note(
        f"In the batches of the service, {share:.2%} of the tokens of the whole corpus are padding."
    )
    report.add_note(
        "'distance of C' is |C_n - C| / |C| in the Frobenius norm, with C of the most tokens. Below about D tokens C is singular "
        "without damping. Rows between two sizes are batched separately here, which adds padding."
    )
    report.add_note(json.dumps({"parameters": experiment.parameters.model_dump(mode="json")}))


if __name__ == "__main__":
    main()
