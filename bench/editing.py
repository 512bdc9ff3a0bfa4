"""Edits of a table of facts: single edits, pairs of edits of one subject, and many edits.

    python bench/editing.py single  --cases 200
    python bench/editing.py pairs   --cases 50
    python bench/editing.py many    --cases 100
    python bench/editing.py single  --model FOLDER --data cases.json

Cases come from the model's facts.jsonl, or from --data in the form of CounterFact. Cases at even indices of the seeded
order were used to tune the shipped recipe; results are for those at odd indices (--split test, the default).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from service.datasets.loading import read_records
from service.datasets.record import Record
from service.editing.context import EditorContext, build_editor_context, find_recipe
from service.editing.find_factors import find_factors
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.evaluation.metrics import RecordScores
from service.evaluation.strengths import assess_rewrite, choose_group_strengths, choose_strength_alone
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models.loading import WeightRef, load_model
from service.models.scoring import compute_perplexity, log_probs_blocking
from service.patches.patch import BASE, PatchSet, weights_patch
from service.recipes.recipe import Recipe
from service.recipes.strength_schedule import StrengthSchedule, strength_schedule
from service.scores.scores import bootstrap_mean, bootstrap_score, share_preferring_new, share_preferring_true
from service.settings import SHIPPED_MODEL
from service.weights.composition import apply_delta
from service.weights.factors import Association, LowRank

console = Console()
SuccessRates = tuple[float, float, float]


class EditingExperiment:
    """A model, its editor context, and a replica that measures sets of associations."""

    def __init__(
        self,
        args: argparse.Namespace,
        tokens: Sequence[int] = (60_000,),
        multiples: Sequence[float] | None = None,
    ) -> None:
        """`tokens`: of the statistics, the largest is the corpus; `multiples` of the width of a key replace them."""
        self.model = load_model(args.model, args.device)
        self.parameters = self._parameters(args)
        self.token_counts = [round(m * self.model.intermediate_size) for m in multiples or ()] or list(tokens)
        recipe = Recipe(source="bench", rome=self.parameters)
        self.editor: EditorContext = run_to_completion(
            build_editor_context(
                self.model,
                Path(args.stats) if args.stats else None,
                tokens=max(self.token_counts),
                recipe=recipe,
            )
        )
        self.replica = VersionedModel(self.model, EmptyLedger())
        self.contexts = run_to_completion(
            self.editor.get_contexts(self.parameters.contexts, self.parameters.seed)
        )
        self.statistics = run_to_completion(self.editor.get_statistics(self.parameters.layers))

    def _parameters(self, args: argparse.Namespace) -> RomeParameters:
        recipe = find_recipe(self.model)
        base = recipe.rome.model_dump() if recipe else {"layers": [1], "learning_rate": 0.2, "steps": 25}
        return RomeParameters.model_validate(base | json.loads(args.hparams))

    def compute_associations(self, case: Record, name: str, **changes: object) -> list[Association]:
        parameters = self.parameters.model_copy(update=changes)
        steps = find_factors(
            self.model,
            self.statistics,
            self.contexts,
            fill_prompt(case.prompt, case.subject),
            case.target_new,
            parameters,
            name,
        )
        return [a for a in run_to_completion(steps).updates if isinstance(a, Association)]

    def schedule(self, strengths: Sequence[float], active: int) -> StrengthSchedule:
        return strength_schedule(self.parameters, strengths, active, self.model.intermediate_size)

    def measure(self, cases: Sequence[Record], patch: PatchSet) -> list[SuccessRates]:
        """Return (ES, PS, NS) of each case with these weights; nan where the case has no probe of that kind."""
        pairs: list[tuple[str, str]] = []
        for c in cases:
            for prompt in (c.text, *c.paraphrases, *(n.prompt for n in c.neighbours)):
                pairs += [(prompt, c.target_new), (prompt, c.target_true or "")]
        with self.replica.use_patch(patch):
            scores = iter(log_probs_blocking(self.model, pairs))
        records = []
        for c in cases:
            case_scores = [
                (next(scores)[0], next(scores)[0]) for _ in range(1 + len(c.paraphrases) + len(c.neighbours))
            ]
            neighbours_start = 1 + len(c.paraphrases)
            es, ps, ns = (
                share_preferring_new(case_scores[:1]),
                share_preferring_new(case_scores[1:neighbours_start]),
                share_preferring_true(case_scores[neighbours_start:]),
            )
            nan = float("nan")
            whole = [nan if x is None else x for x in (es, ps, ns)]
            records.append((whole[0], whole[1], whole[2]))
        return records

    def loss(self, patch: PatchSet, texts: Sequence[str]) -> float:
        with self.replica.use_patch(patch):
            return run_to_completion(compute_perplexity(self.model, texts))


def print_scores(title: str, records: Sequence[SuccessRates], seconds: Sequence[float] = ()) -> None:
    table = Table(title=title)
    for name in ("", "mean", "95 % interval"):
        table.add_column(name, justify="right")
    for i, name in enumerate(("ES", "PS", "NS")):
        mean, low, high = bootstrap_mean([r[i] for r in records if not math.isnan(r[i])])
        table.add_row(name, f"{100 * mean:.1f}", f"{100 * low:.1f} to {100 * high:.1f}")
    whole = [r for r in records if not any(map(math.isnan, r))]
    mean, low, high = bootstrap_score(whole)
    table.add_row("S", f"{100 * mean:.1f}", f"{100 * low:.1f} to {100 * high:.1f}")
    if seconds:
        ordered = sorted(seconds)
        table.add_row(
            "seconds", f"{ordered[len(ordered) // 2]:.2f}", f"{ordered[0]:.2f} to {ordered[-1]:.2f}"
        )
    console.print(table)


def bench_single(experiment: EditingExperiment, cases: Sequence[Record], args: argparse.Namespace) -> None:
    """Measure one edit at a time on the base model, at the strength that the service's policy chooses."""
    records, seconds, strengthened, failed = [], [], 0, 0
    for case in track(cases, "one edit at a time", console=console, disable=args.quiet):
        began = time.perf_counter()
        associations = experiment.compute_associations(case, "e")
        seconds.append(time.perf_counter() - began)
        choice = run_to_completion(
            choose_strength_alone(
                experiment.replica, case, associations, experiment.schedule(args.strengths, 1)
            )
        )
        scores = RecordScores.from_scores(case, choice.measurement)
        measures = scores.measures()
        es, ps, ns = (float("nan") if (x := measures[name]) is None else x for name in ("ES", "PS", "NS"))
        record = (es, ps, ns)
        accepted = assess_rewrite(case, scores.rewrite, experiment.parameters.margin).accepted
        strengthened += choice.strength > args.strengths[0] and accepted
        failed += not accepted
        records.append(record)
        if args.verbose and (record[0] < 1 or record[1] < 1 or record[2] < 0.9):
            console.print(
                record, case.subject, "|", case.prompt, "|", case.target_true, "->", case.target_new
            )
    print_scores(f"{len(cases)} facts, one edit at a time ({experiment.model.name})", records, seconds)
    console.print(f"strengthened: {strengthened}; not accepted at any strength: {failed}")


def edits_hold(experiment: EditingExperiment, cases: Sequence[Record], patch: PatchSet) -> list[bool]:
    return [r[0] == 1.0 for r in experiment.measure(cases, patch)]


def bench_pairs(experiment: EditingExperiment, cases: Sequence[Record], args: argparse.Namespace) -> None:
    """Measure pairs of edits of one subject in two relations, all active together."""
    by_subject: dict[str, list[Record]] = defaultdict(list)
    for c in cases:
        by_subject[c.subject].append(c)
    chosen: list[Record] = []
    for group in by_subject.values():
        two = list({c.relation: c for c in group}.values())[:2]
        if len(two) == 2 and len(chosen) < 2 * args.cases:
            chosen += two
    edits = [
        experiment.compute_associations(c, f"{i:04}")
        for i, c in enumerate(track(chosen, "pairs", console=console, disable=args.quiet))
    ]
    table = Table(title=f"{len(chosen) // 2} pairs of one subject, all {len(chosen)} edits active")
    for name in ("composition", "both hold", "first", "second"):
        table.add_column(name, justify="right")
    for name, patch in composition_variants(experiment, edits, chosen, args).items():
        holds = edits_hold(experiment, chosen, patch)
        first, second = holds[::2], holds[1::2]
        both = sum(a and b for a, b in zip(first, second, strict=True))
        n = len(first)
        table.add_row(
            name, f"{100 * both / n:.0f} %", f"{100 * sum(first) / n:.0f} %", f"{100 * sum(second) / n:.0f} %"
        )
    console.print(table)


def sum_rank_one_updates(experiment: EditingExperiment, edits: Iterable[list[Association]]) -> PatchSet:
    """Return the sum of the rank-one updates, each computed alone."""
    total: dict[int, LowRank] = {}
    for a in (x for group in edits for x in group):
        update = a.rank_one()
        previous = total.get(a.layer)
        total[a.layer] = (
            update
            if previous is None
            else LowRank(
                torch.cat([previous.left, update.left], 1), torch.cat([previous.right, update.right])
            )
        )
    conv1d = experiment.model.architecture.conv1d
    return weights_patch(
        {
            WeightRef(x): apply_delta(experiment.model.weight(x).data, change, conv1d)
            for x, change in total.items()
        }
    )


def edit_sequentially(
    experiment: EditingExperiment, cases: Sequence[Record], compat: str | None, quiet: bool
) -> PatchSet:
    """Return weights edited as published: each edit is computed on the weights that contain the previous
    edits."""
    patch = BASE
    conv1d = experiment.model.architecture.conv1d
    for i, c in enumerate(track(cases, f"sequential {compat or 'r-ROME'}", console=console, disable=quiet)):
        with experiment.replica.use_patch(patch):
            associations = experiment.compute_associations(c, f"{i:04}", compat=compat)
            updated = {
                a.weight_ref: apply_delta(experiment.model.parameter(a.weight_ref).data, a.rank_one(), conv1d)
                for a in associations
            }
            patch = weights_patch({**patch.weights, **updated})
    return patch


def choose_strengths(
    experiment: EditingExperiment,
    edits: list[list[Association]],
    cases: Sequence[Record],
    strengths: Sequence[float],
) -> list[Association]:
    """Return the edits at the strengths of the service's policy, chosen in sequence given the previous edits.

    No edit is rejected, so that every composition is measured on the same edits.
    """
    active: list[Association] = []
    for count, (group, case) in enumerate(zip(edits, cases, strict=True)):
        schedule_for = partial(experiment.schedule, strengths)
        (strength,) = run_to_completion(
            choose_group_strengths(experiment.replica, [case], [group], active, count, schedule_for)
        )
        active += [a.scaled(strength) for a in group]
    return active


def composition_variants(
    experiment: EditingExperiment,
    edits: list[list[Association]],
    cases: Sequence[Record],
    args: argparse.Namespace,
) -> dict[str, PatchSet]:
    """Return the weights of each way to compose many edits."""
    all_associations = [a for group in edits for a in group]
    strengthened_associations = choose_strengths(experiment, edits, cases, args.strengths)
    result = {
        "joint, strengthened": experiment.replica.compose_patch(strengthened_associations),
        "joint": experiment.replica.compose_patch(all_associations),
        "factors summed": sum_rank_one_updates(experiment, edits),
    }
    if not args.fast:
        result["sequential r-ROME"] = edit_sequentially(experiment, cases, None, args.quiet)
        result["sequential ROME"] = edit_sequentially(experiment, cases, "meng2022", args.quiet)
    return result


def bench_many(experiment: EditingExperiment, cases: Sequence[Record], args: argparse.Namespace) -> None:
    """Measure many active edits for each composition."""
    chosen = list({c.subject: c for c in reversed(cases)}.values())[: args.cases]
    edits = [
        experiment.compute_associations(c, f"{i:04}")
        for i, c in enumerate(track(chosen, "edits", console=console, disable=args.quiet))
    ]
    edited_prompts = {c.text for c in chosen}
    texts = [t for t in experiment.editor.corpus.texts if not any(t.startswith(p) for p in edited_prompts)][
        ::7
    ][:500]
    table = Table(title=f"{len(chosen)} edits active at once ({experiment.model.name})")
    for name in ("composition", "ES", "PS", "NS", "S", "S, 95 % interval", "perplexity before", "after"):
        table.add_column(name, justify="right")
    before = experiment.loss(BASE, texts)
    for name, patch in composition_variants(experiment, edits, chosen, args).items():
        records = experiment.measure(chosen, patch)
        whole = [r for r in records if not any(map(math.isnan, r))]
        means = [bootstrap_mean([r[i] for r in records if not math.isnan(r[i])])[0] for i in range(3)]
        score, low, high = bootstrap_score(whole)
        row = [f"{100 * x:.1f}" for x in (*means, score)]
        after = experiment.loss(patch, texts)
        table.add_row(name, *row, f"{100 * low:.1f} to {100 * high:.1f}", f"{before:.3f}", f"{after:.3f}")
    console.print(table)
    check_revert_all(experiment, edits)


def check_revert_all(experiment: EditingExperiment, edits: list[list[Association]]) -> None:
    """Revert all edits in random order, and check that the final weights equal the base weights byte for
    byte."""
    active = dict(enumerate(edits))
    base = {x: experiment.model.weight(x).data.clone() for x in range(experiment.model.num_layers)}
    order = random.Random(0).sample(sorted(active), len(active))
    for i in order:
        del active[i]
        patch = experiment.replica.compose_patch(a for group in active.values() for a in group)
    with experiment.replica.use_patch(patch):
        same = all(torch.equal(experiment.model.weight(x).data, w) for x, w in base.items())
    console.print(
        f"all {len(edits)} reverted in random order: patch {'equal' if same else 'DIFFER FROM'} the base"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["single", "pairs", "many"])
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument(
        "--data", type=Path, help="facts.jsonl or CounterFact JSON (default: the model's own table)"
    )
    p.add_argument("--cases", type=int, default=None)
    p.add_argument("--split", choices=["test", "tune", "all"], default="test")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--hparams", default="{}", help="JSON with changes of the recipe")
    p.add_argument("--strengths", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0])
    p.add_argument("--stats", default=None, help="folder of statistics, reused between runs")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--fast", action="store_true", help="skip the sequential baselines")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    p.add_argument("--verbose", action="store_true", help="print the cases that fail")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    experiment = EditingExperiment(args)
    data = args.data or Path(args.model) / "facts.jsonl"
    cases = read_records(data, args.seed)
    cases = {"test": cases[1::2], "tune": cases[0::2], "all": cases}[args.split]
    args.cases = args.cases or {"single": 200, "pairs": 50, "many": 100}[args.what]
    if args.what == "single":
        bench_single(experiment, cases[: args.cases], args)
    else:
        {"pairs": bench_pairs, "many": bench_many}[args.what](experiment, cases, args)


if __name__ == "__main__":
    main()
