"""Cost and judgement of the probes that the service finds for an edit.

    python bench/auto_probes.py
    python bench/auto_probes.py --model FOLDER --edits 20

Each fact of the table that the model says greedily is edited alone, as a dry run: with probes that the service finds,
and with none. The seconds of both are compared, and the neighbours whose answers changed are counted.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness import Report, Spread
from service.datasets.fact_table import FACTS_FILE
from service.datasets.loading import read_records
from service.datasets.record import Record
from service.editing.candidate import CandidateEdit, ResolvedEdit
from service.editing.context import EditorContext, build_editor_context
from service.editing.edit_job import choose_candidate_strengths, resolve_edit
from service.editing.greedy_text import generate_greedy
from service.editing.guard import GuardResult
from service.editing.measure import measure_baseline
from service.editing.probes import neighbor_preserved
from service.editing.side_effects import NeighborOutcome, neighbor_outcomes
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.kit.steps import run_to_completion
from service.kit.text import begins_with, fill_prompt
from service.models.loading import load_model
from service.schemas import EditRequest
from service.settings import SHIPPED_MODEL

CHOICES: dict[str, Any] = {"none": {}, "auto": "auto"}
PARTS = ("resolve", "search", "measure", "all")


@dataclass
class EditTimes:
    """The seconds of the parts of each edit, for one choice of probes."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def add(self, *moments: float) -> None:
        """Add the parts of one edit from the moments between them."""
        spans = [b - a for a, b in itertools.pairwise(moments)]
        for part, span in zip(PARTS, [*spans, moments[-1] - moments[0]], strict=True):
            self.seconds[part].append(span)

    def spread(self, part: str) -> Spread:
        return Spread(tuple(self.seconds[part]))


class ProbeExperiment:
    """A model and its editor context."""

    def __init__(self, model: str, facts: Path, data_dir: Path, method: str, hparams: dict[str, Any]) -> None:
        self.model = load_model(model)
        self.context: EditorContext = run_to_completion(
            build_editor_context(self.model, data_dir / "statistics", facts=facts)
        )
        self.replica = VersionedModel(self.model, EmptyLedger())
        self.method, self.hparams = method, hparams
        self.times = {name: EditTimes() for name in CHOICES}
        self.outcomes: list[list[NeighborOutcome]] = []
        self.results: list[tuple[ResolvedEdit, GuardResult]] = []

    def known_records(self, records: Sequence[Record], count: int) -> list[Record]:
        """Return the first records whose true object is the model's greedy answer."""
        known: list[Record] = []
        for record in records:
            (text,) = run_to_completion(generate_greedy(self.model, [record.text]))
            if begins_with(text.text, record.target_true or ""):
                known.append(record)
            if len(known) == count:
                break
        return known

    def edit(self, record: Record, choice: str) -> tuple[ResolvedEdit, GuardResult]:
        """Resolve, compute and measure an edit, and add its seconds."""
        request = EditRequest.model_validate(
            {
                "subject": record.subject,
                "prompt": record.prompt,
                "target_new": record.target_new,
                "probes": CHOICES[choice],
                "method": self.method,
                "hparams": self.hparams,
            }
        )
        moments = [time.perf_counter()]
        resolved_edit = run_to_completion(resolve_edit(self.replica, request, self.context))
        moments.append(time.perf_counter())
        statement = fill_prompt(record.prompt, record.subject)
        factors = run_to_completion(
            self.context.find_factors(statement, record.target_new, self.method, self.hparams)
        )
        moments.append(time.perf_counter())
        candidate = CandidateEdit(resolved_edit, factors)
        baseline = run_to_completion(measure_baseline(self.replica, self.context, [candidate], 0))
        (result,) = run_to_completion(
            choose_candidate_strengths(self.replica, self.context, [candidate], baseline)
        )
        moments.append(time.perf_counter())
        self.times[choice].add(*moments)
        return resolved_edit, result

    def run(self, records: Sequence[Record], verbose: bool) -> None:
        """Edit each record once with each choice, in alternating order. The first record warms up."""
        for number, record in enumerate(records):
            for choice in [*CHOICES][:: 1 if number % 2 else -1]:
                resolved_edit, result = self.edit(record, choice)
                if choice == "auto":
                    self.results.append((resolved_edit, result))
                    found = list(neighbor_outcomes(resolved_edit, result.before, result.after))
                    self.outcomes.append(found)
                    if verbose:
                        _print_outcomes(resolved_edit, result, found)
            if number == 0:
                self.times = {name: EditTimes() for name in CHOICES}


def _print_outcomes(edit: ResolvedEdit, result: GuardResult, found: Sequence[NeighborOutcome]) -> None:
    print(f"\n{edit.rewrite_probe.prompt}: {edit.rewrite_probe.true} to {edit.rewrite_probe.new}", end="; ")
    print([str(c.name) for c in result.checks if not c.passed])
    for p, r in zip(edit.paraphrase_probes, result.after.probe_results[1:], strict=False):
        print("   p", p.source, repr(p.prompt), r.says_new)
    for o in found:
        mark = "CHANGED" if o.has_changed else "kept"
        before = o.result_before.probabilities()["true"]
        print("   n", o.probe.source, o.probe.subject, repr(o.text_before.text), f"{before:.2f}", end=" ")
        print(mark, repr(o.text_after.text), "preferred" if o.result_after.prefers_new else "")


def report_figures(experiment: ProbeExperiment, report: Report) -> None:
    """Add the tables of the seconds and of the neighbours."""
    none, auto = experiment.times["none"], experiment.times["auto"]
    rows = [
        [part, none.spread(part), auto.spread(part), auto.spread(part).ratio_to(none.spread(part))]
        for part in PARTS
    ]
    report.add_table("seconds of an edit", ["part", "none", "auto", "auto / none"], rows)
    outcomes = [o for found in experiment.outcomes for o in found]
    by_rule = {
        "its answer changed": lambda o: o.has_changed,
        "the new object is preferred": lambda o: not neighbor_preserved(o.probe, o.result_after),
        "its answer is the new object": lambda o: begins_with(o.text_after.text, o.probe.new),
    }
    rows = []
    for rule, lost in by_rule.items():
        shares = [sum(map(lost, found)) / len(found) for found in experiment.outcomes if found]
        failing = sum(share > 0.3 for share in shares)
        rows.append([rule, f"{sum(map(lost, outcomes))} of {len(outcomes)}", f"{failing} of {len(shares)}"])
    report.add_table("neighbours", ["a neighbour is lost if", "lost", "edits rejected at 0.7"], rows)
    numbers = [len(found) for found in experiment.outcomes]
    report.add_note(f"neighbours found for an edit: {min(numbers)} to {max(numbers)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(SHIPPED_MODEL))
    parser.add_argument("--facts", type=Path, default=SHIPPED_MODEL / FACTS_FILE)
    parser.add_argument("--data-dir", type=Path, default=Path("runs/auto_probes"))
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--method", default="rome")
    parser.add_argument("--layers", type=int, nargs="*", help="edited layers, in place of the recipe's")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="print every probe")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    hparams = {"layers": args.layers} if args.layers else {}
    experiment = ProbeExperiment(args.model, args.facts, args.data_dir, args.method, hparams)
    records = experiment.known_records(read_records(args.facts, args.seed), args.edits + 1)
    experiment.run(records, args.verbose)
    report_figures(experiment, Report("auto_probes"))


if __name__ == "__main__":
    main()
