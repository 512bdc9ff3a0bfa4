"""Acceptance rates of the guard: good edits, deliberately bad edits, and pairs with and without a conflict.

    python bench/guard.py
    python bench/guard.py --cases 100

Every edit is computed on the base model. The guard evaluates it alone at strength 1, with two paraphrases and
five neighbours of the record or, with `--auto`, with the probes that the service finds. Facts at even indices of the
seeded order are used to choose limits, those at odd indices to report results.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from service.covariance.collect import collect_statistics
from service.covariance.corpus import Corpus
from service.datasets.fact_table import find_facts_file, read_fact_rows
from service.datasets.loading import read_records
from service.datasets.record import Record
from service.editing.candidate import CandidateEdit, ResolvedEdit
from service.editing.conflicts import ConflictCandidate, find_conflict_candidates
from service.editing.context import EditorContext, build_editor_context
from service.editing.edit_job import resolve_edit
from service.editing.edit_spec import EditFactors
from service.editing.guard import GuardResult, evaluate_guard
from service.editing.measure import evaluate_candidates, measure_baseline
from service.editing.probes import Probe
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.models.loading import load_model
from service.schemas import AUTO, EditRequest, Guard
from service.settings import SHIPPED_MODEL
from service.weights.factors import Association, EditUpdate

console = Console(width=160)
FAST_HPARAMS = {"contexts": 1}  # to save time
EXPLODING_FACTORS = (4.0, 10.0, 30.0)  # factors of an update with a divisor close to zero
#: limits varied one at a time, with defaults for the others
GUARD_LIMIT_GRID: dict[str, tuple[float, ...]] = {
    "min_probability": (0.0, 0.1, 0.3, 0.5),
    "min_paraphrase": (0.5, 1.0),
    "min_neighborhood": (0.0, 0.5, 0.7, 0.9, 1.0),
    "max_perplexity": (1.01, 1.02, 1.05, 1.1, 1.25),
    "max_norm": (0.2, 0.5, 1.0, 1.5, 2.0, 5.0),
}
CONFLICT_LIMITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # values of `conflict_threshold`


@dataclass(frozen=True)
class GuardCase:
    """An edit and its evaluation by the guard."""

    resolved_edit: ResolvedEdit
    guard_result: GuardResult

    def passes_guard(self, probes: bool = True, **limits: float) -> bool:
        """Return whether the edit passes with these limits; `probes=False` ignores paraphrase and neighborhood
        checks."""
        guard = self.resolved_edit.request.guard.model_copy(update=limits)
        resolved_edit = replace(
            self.resolved_edit, request=self.resolved_edit.request.model_copy(update={"guard": guard})
        )
        result = self.guard_result
        checks = evaluate_guard(
            resolved_edit, result.before, result.after, result.strength, result.norm_ratio
        ).checks
        return all(c.passed for c in checks if probes or c.name not in ("paraphrase", "neighborhood"))


class GuardExperiment:
    """A model, its editor context, and facts for choosing limits and for reporting."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = load_model(args.model)
        self.context: EditorContext = run_to_completion(build_editor_context(self.model))
        self.replica = VersionedModel(self.model, EmptyLedger())
        few = Corpus("few", tuple(self.context.corpus.texts[:2]))
        recipe = self.context.recipe
        assert recipe is not None
        layers = list(recipe.rome.layers)
        self.poor_statistics = run_to_completion(collect_statistics(self.model, layers, few))
        self.good_factors: dict[str, EditFactors] = {}  #: by record name
        path = find_facts_file(self.model.path)
        assert path is not None
        self.fact_rows = {(r["subject"], r["relation"]): r for r in read_fact_rows(path)}
        records = read_records(path, args.seed)
        self.splits = {"choose": records[::2], "report": records[1::2]}
        self.rng = random.Random(args.seed)
        self.probes = AUTO if args.auto else None  #: None: those of the record

    # good edits and bad ones

    def evaluate_cases(self, kind: str, records: Sequence[Record]) -> list[GuardCase]:
        """Compute and evaluate edits of one kind."""
        return [self.evaluate_case(kind, r) for r in track(records, kind, transient=True, console=console)]

    def evaluate_case(self, kind: str, record: Record) -> GuardCase:
        resolved_edit = run_to_completion(
            resolve_edit(self.replica, self.build_request(kind, record), self.context)
        )
        candidate = CandidateEdit(resolved_edit, self.compute_factors(kind, record, resolved_edit))
        baseline = run_to_completion(measure_baseline(self.replica, self.context, [candidate], 0))
        (guard_result,) = run_to_completion(
            evaluate_candidates(self.replica, self.context, [candidate], baseline, [1.0])
        )
        return GuardCase(resolved_edit, guard_result)

    def build_request(self, kind: str, record: Record) -> EditRequest:
        layers = {"layers": [self.model.num_layers - 1]} if kind == "wrong layer" else {}
        body = {
            "subject": record.subject,
            "prompt": record.prompt,
            "target_true": record.target_true,
            "hparams": FAST_HPARAMS | layers,
            "probes": self.probes
            or {
                "paraphrase": record.paraphrases[:2],
                "neighborhood": [{"prompt": n.prompt, "target": n.target} for n in record.neighbours[:5]],
            },
        }
        if kind in ("erase", "amplify"):
            return EditRequest.model_validate(body | {"objective": kind})
        nonsense = "".join(self.rng.choices("bcdfghjklmnpqrstvwxz", k=6))
        target = nonsense if kind == "nonsense" else record.target_new
        return EditRequest.model_validate(body | {"target_new": target})

    def compute_factors(self, kind: str, record: Record, resolved_edit: ResolvedEdit) -> EditFactors:
        """Return the factors of an edit; bad kinds scale or redirect those of the good edit."""
        if kind in ("exploding", "poor statistics"):
            good = self.good_factors[record.name]
            if kind == "exploding":
                factor = self.rng.choice(EXPLODING_FACTORS)
                return replace(good, updates=[p.scaled(factor) for p in good.updates])
            poor: list[EditUpdate] = [
                replace(p, direction=self.poor_statistics[p.layer].solve(p.key).float())
                for p in good.updates
                if isinstance(p, Association)
            ]
            return replace(good, updates=poor)
        request, statement = resolved_edit.request, fill_prompt(record.prompt, record.subject)
        factors = run_to_completion(
            self.context.find_factors(
                statement,
                resolved_edit.rewrite_probe.new,
                hparams=request.hparams,
                objective=request.objective,
            )
        )
        if kind == "good":
            self.good_factors[record.name] = factors
        return factors

    # pairs

    def conflict_pairs(self, split: str, count: int) -> dict[str, list[ConflictCandidate]]:
        """Return pairs of edits of one subject: the same relation in another wording, and another relation."""
        of_subject: dict[str, list[Record]] = defaultdict(list)
        for record in self.splits[split]:
            of_subject[record.subject].append(record)
        single = [records[0] for records in of_subject.values()]
        multiple = [records for records in of_subject.values() if len(records) > 1]
        words = track(single[:count], "other wording", transient=True, console=console)
        relations = track(multiple[:count], "other relation", transient=True, console=console)
        return {
            "other wording": [self.measure_conflict(r, self.paraphrased_record(r)) for r in words],
            "other relation": [self.measure_conflict(a, b) for a, b, *_ in relations],
        }

    def paraphrased_record(self, record: Record) -> Record:
        """Return the record with another prompt and another object of its relation."""
        row = self.fact_rows[record.subject, record.relation]
        prompt = self.rng.choice([p for p in row["prompts"] if p != record.prompt])
        used_objects = (record.target_new, record.target_true)
        objects = {r["object"] for (_, relation), r in self.fact_rows.items() if relation == record.relation}
        target = self.rng.choice(sorted(objects.difference(used_objects)) or [record.target_true])
        return replace(record, prompt=prompt, target_new=str(target))

    def measure_conflict(self, old: Record, new: Record) -> ConflictCandidate:
        """Return the effect of a new edit alone on the prompt of an older edit."""
        factors = [
            run_to_completion(
                self.context.find_factors(
                    fill_prompt(r.prompt, r.subject), r.target_new, hparams=FAST_HPARAMS, edit=name
                )
            )
            for r, name in ((old, "old"), (new, "new"))
        ]
        body = {k: getattr(old, k) for k in ("subject", "prompt", "target_new", "target_true")}
        probe = Probe(new.text, new.target_new, new.target_true or "?")
        others = {"old": (body, factors[0].updates)}
        (conflict,) = run_to_completion(
            find_conflict_candidates(self.replica, probe, factors[1].updates, others)
        )
        return conflict


BAD_KINDS = ("wrong layer", "exploding", "nonsense", "poor statistics")


def rejection_table(cases: dict[str, list[GuardCase]], split: str) -> Table:
    """Return, for each limit, the percentage of good edits rejected and of bad edits accepted."""
    table = Table(
        title=f"facts for {split}: % of good edits rejected, % of bad edits accepted", title_style=""
    )
    for name in ("limits", "good rejected", *BAD_KINDS):
        table.add_column(name, justify="left" if name == "limits" else "right")

    def row(name: str, passes: Callable[[GuardCase], bool]) -> None:
        pass_rates = {kind: sum(map(passes, some)) / len(some) for kind, some in cases.items() if some}
        cells = [
            f"{100 * (1 - pass_rates['good']):.0f}",
            *(f"{100 * pass_rates[kind]:.0f}" for kind in BAD_KINDS),
        ]
        table.add_row(name, *cells)

    row("defaults", lambda c: c.passes_guard())
    row("defaults, without probes", lambda c: c.passes_guard(probes=False))
    for name, limits in GUARD_LIMIT_GRID.items():
        for limit in limits:
            row(f"{name} {limit:g}", lambda c, n=name, x=limit: c.passes_guard(**{n: x}))  # type: ignore[misc]
    return table


def figures_table(cases: dict[str, list[GuardCase]]) -> Table:
    """Return the minimum, median and maximum measurement of each check by kind of edit."""
    table = Table(title="figures: min, median, max", title_style="")
    names = sorted(
        {c.name for kind_cases in cases.values() for case in kind_cases for c in case.guard_result.checks}
    )
    for name in ("kind", *names):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, kind_cases in cases.items():
        cells = []
        for name in names:
            values = sorted(
                c.figure for case in kind_cases for c in case.guard_result.checks if c.name == name
            )
            cells.append(
                " ".join(f"{x:.3g}" for x in (values[0], values[len(values) // 2], values[-1]))
                if values
                else ""
            )
        table.add_row(kind, *cells)
    return table


def conflict_table(pairs: dict[str, list[ConflictCandidate]], split: str) -> Table:
    """Return, for each limit, the percentage of pairs classified as a conflict."""
    table = Table(title=f"pairs for {split}: % classified as a conflict", title_style="")
    for name in ("limit", *pairs):
        table.add_column(name, justify="right")
    for limit in CONFLICT_LIMITS:
        shares = [100 * sum(r.is_conflict(limit) for r in some) / len(some) for some in pairs.values()]
        table.add_row(f"{limit:g}", *(f"{s:.0f}" for s in shares))
    medians = [sorted(r.cosine or 0.0 for r in some)[len(some) // 2] for some in pairs.values()]
    table.add_row("median cosine", *(f"{c:.2f}" for c in medians))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(SHIPPED_MODEL))
    parser.add_argument("--cases", type=int, default=20, help="edits of each kind, and pairs, in each split")
    parser.add_argument(
        "--splits", nargs="*", default=["choose", "report"], help="splits of the facts (default: both)"
    )
    parser.add_argument("--auto", action="store_true", help="with the probes that the service finds")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    experiment = GuardExperiment(args)
    console.print(f"{Path(args.model).name}, {args.cases} of each kind; limits: {Guard()}")
    for split in args.splits:
        records = experiment.splits[split][: args.cases]
        cases = {kind: experiment.evaluate_cases(kind, records) for kind in ("good", *BAD_KINDS)}
        others = {kind: experiment.evaluate_cases(kind, records) for kind in ("erase", "amplify")}
        console.print(rejection_table(cases, split), figures_table(cases | others))
        console.print(conflict_table(experiment.conflict_pairs(split, args.cases), split))


if __name__ == "__main__":
    main()
