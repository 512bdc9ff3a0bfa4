"""What the guard lets through and what it stops: good edits, deliberately bad ones, and pairs of edits in conflict or not.

    python bench/guard.py
    python bench/guard.py --cases 100

Every edit is found on the base model and judged alone by the guard itself, at strength 1, with two paraphrases and five
neighbours. Facts at even places of the seeded order are for choosing limits, those at odd places for reporting them.
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

from service.covariance.collect import collect_steps
from service.covariance.corpus import Corpus
from service.datasets.records import Record, facts_beside, read_facts, read_records
from service.editing.candidate import Draft, Plan, Trial, judge, stand_steps, trial_steps
from service.editing.conflicts import Rival, rivals_steps
from service.editing.context import Toolkit, prepare_steps
from service.editing.edit_job import plan_steps
from service.editing.methods.rome import Found
from service.editing.probes import Question
from service.engine.versioned_model import NoLedger, Replica
from service.kit.steps import finish
from service.kit.text import fill
from service.models.loading import load
from service.schemas import EditRequest, Guard
from service.settings import SHIPPED_MODEL
from service.weights.composition import Association

console = Console(width=160)
CONTEXTS = {"contexts": 1}  # few, to be quick
EXPLODING = (4.0, 10.0, 30.0)  # how many times too large: a divisor that is nearly nought
#: the limits that are tried one by one, the others as they are by default
GRID: dict[str, tuple[float, ...]] = {
    "min_probability": (0.0, 0.1, 0.3, 0.5),
    "min_paraphrase": (0.5, 1.0),
    "min_neighborhood": (0.0, 0.5, 0.7, 0.9, 1.0),
    "max_perplexity": (1.01, 1.02, 1.05, 1.1, 1.25),
    "max_norm": (0.2, 0.5, 1.0, 1.5, 2.0, 5.0),
}
LIMITS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of a conflict


@dataclass(frozen=True)
class Case:
    """An edit that was tried."""

    plan: Plan
    trial: Trial

    def lands(self, probes: bool = True, **limits: float) -> bool:
        """Whether the guard lets it land with these limits; without probes it knows neither paraphrases nor neighbours."""
        guard = self.plan.request.guard.model_copy(update=limits)
        plan = replace(self.plan, request=self.plan.request.model_copy(update={"guard": guard}))
        t = self.trial
        checks = judge(plan, t.before, t.after, t.strength, t.norm_ratio).checks
        return all(c.passed for c in checks if probes or c.name not in ("paraphrase", "neighborhood"))


class Lab:
    """The shipped model, its tools, and facts for choosing and for reporting."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = load(args.model)
        self.toolkit: Toolkit = finish(prepare_steps(self.model))
        self.replica = Replica(self.model, NoLedger())
        few = Corpus("few", tuple(self.toolkit.corpus.texts[:2]))
        recipe = self.toolkit.recipe
        assert recipe is not None
        layers = list(recipe.rome.layers)
        self.poor = finish(collect_steps(self.model, layers, few))
        self.good: dict[str, Found] = {}  #: by the record's name
        path = facts_beside(self.model.folder)
        assert path is not None
        self.rows = {(r["subject"], r["relation"]): r for r in read_facts(path)}
        records = read_records(path, args.seed)
        self.halves = {"choose": records[::2], "report": records[1::2]}
        self.draw = random.Random(args.seed)

    # good edits and bad ones

    def tried(self, kind: str, records: Sequence[Record]) -> list[Case]:
        """Edits of a kind, judged."""
        return [self.case(kind, r) for r in track(records, kind, transient=True, console=console)]

    def case(self, kind: str, record: Record) -> Case:
        plan = finish(plan_steps(self.replica, self.request(kind, record), self.toolkit))
        draft = Draft(plan, self.found(kind, record, plan))
        stand = finish(stand_steps(self.replica, self.toolkit, [draft], 0))
        (trial,) = finish(trial_steps(self.replica, self.toolkit, [draft], stand, [1.0]))
        return Case(plan, trial)

    def request(self, kind: str, record: Record) -> EditRequest:
        layers = {"layers": [self.model.layers - 1]} if kind == "wrong layer" else {}
        asked = {
            "subject": record.subject,
            "prompt": record.prompt,
            "target_true": record.target_true,
            "hparams": CONTEXTS | layers,
            "probes": {
                "paraphrase": record.paraphrases[:2],
                "neighborhood": [{"prompt": n.prompt, "target": n.target} for n in record.neighbours[:5]],
            },
        }
        if kind in ("erase", "amplify"):
            return EditRequest.model_validate(asked | {"objective": kind})
        nonsense = "".join(self.draw.choices("bcdfghjklmnpqrstvwxz", k=6))
        target = nonsense if kind == "nonsense" else record.target_new
        return EditRequest.model_validate(asked | {"target_new": target})

    def found(self, kind: str, record: Record, plan: Plan) -> Found:
        """What is found; too large, or in a direction from poor statistics, it is the good one's otherwise."""
        if kind in ("exploding", "poor statistics"):
            good = self.good[record.name]
            if kind == "exploding":
                factor = self.draw.choice(EXPLODING)
                return replace(good, pieces=[p.scaled(factor) for p in good.pieces])
            known = [p for p in good.pieces if isinstance(p, Association)]
            poor = [replace(p, direction=self.poor[p.layer].solve(p.key).float()) for p in known]
            return replace(good, pieces=poor)
        request, statement = plan.request, fill(record.prompt, record.subject)
        found = finish(
            self.toolkit.find_steps(
                statement, plan.rewrite.new, hparams=request.hparams, objective=request.objective
            )
        )
        if kind == "good":
            self.good[record.name] = found
        return found

    # pairs

    def pairs(self, half: str, count: int) -> dict[str, list[Rival]]:
        """Of pairs of edits about one subject: the same relation in other words, and another relation."""
        of_subject: dict[str, list[Record]] = defaultdict(list)
        for record in self.halves[half]:
            of_subject[record.subject].append(record)
        single = [records[0] for records in of_subject.values()]
        several = [records for records in of_subject.values() if len(records) > 1]
        words = track(single[:count], "other words", transient=True, console=console)
        relations = track(several[:count], "other relation", transient=True, console=console)
        return {
            "other words": [self.rival(r, self.in_other_words(r)) for r in words],
            "other relation": [self.rival(a, b) for a, b, *_ in relations],
        }

    def in_other_words(self, record: Record) -> Record:
        """The record with another of its prompts and another of its relation's objects."""
        row = self.rows[record.subject, record.relation]
        prompt = self.draw.choice([p for p in row["prompts"] if p != record.prompt])
        taken = (record.target_new, record.target_true)
        objects = {r["object"] for (_, relation), r in self.rows.items() if relation == record.relation}
        target = self.draw.choice(sorted(objects.difference(taken)) or [record.target_true])
        return replace(record, prompt=prompt, target_new=str(target))

    def rival(self, old: Record, new: Record) -> Rival:
        """What a new edit does alone on an older one's prompt."""
        found = [
            finish(
                self.toolkit.find_steps(fill(r.prompt, r.subject), r.target_new, hparams=CONTEXTS, edit=name)
            )
            for r, name in ((old, "old"), (new, "new"))
        ]
        body = {k: getattr(old, k) for k in ("subject", "prompt", "target_new", "target_true")}
        question = Question(new.text, new.target_new, new.target_true or "?")
        others = {"old": (body, found[0].pieces)}
        (rival,) = finish(rivals_steps(self.replica, question, found[1].pieces, others))
        return rival


BAD = ("wrong layer", "exploding", "nonsense", "poor statistics")


def rates(cases: dict[str, list[Case]], half: str) -> Table:
    """Of each limit: how many good edits are stopped, and how many bad ones of each kind land."""
    table = Table(title=f"facts for {half}: % of good edits stopped, % of bad ones that land", title_style="")
    for name in ("limits", "good stopped", *BAD):
        table.add_column(name, justify="left" if name == "limits" else "right")

    def row(name: str, lands: Callable[[Case], bool]) -> None:
        landed = {kind: sum(map(lands, some)) / len(some) for kind, some in cases.items() if some}
        cells = [f"{100 * (1 - landed['good']):.0f}", *(f"{100 * landed[kind]:.0f}" for kind in BAD)]
        table.add_row(name, *cells)

    row("as they are", lambda c: c.lands())
    row("as they are, without probes", lambda c: c.lands(probes=False))
    for name, limits in GRID.items():
        for limit in limits:
            row(f"{name} {limit:g}", lambda c, n=name, x=limit: c.lands(**{n: x}))  # type: ignore[misc]
    return table


def figures(cases: dict[str, list[Case]]) -> Table:
    """Where the figures of each rule lie: least, median, greatest."""
    table = Table(title="figures: least, median, greatest", title_style="")
    names = sorted({c.name for some in cases.values() for case in some for c in case.trial.checks})
    for name in ("kind", *names):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, some in cases.items():
        cells = []
        for name in names:
            seen = sorted(c.figure for case in some for c in case.trial.checks if c.name == name)
            cells.append(
                " ".join(f"{x:.3g}" for x in (seen[0], seen[len(seen) // 2], seen[-1])) if seen else ""
            )
        table.add_row(kind, *cells)
    return table


def conflicts(pairs: dict[str, list[Rival]], half: str) -> Table:
    """Of each limit: how many pairs are called a conflict."""
    table = Table(title=f"pairs for {half}: % called a conflict", title_style="")
    for name in ("limit", *pairs):
        table.add_column(name, justify="right")
    for limit in LIMITS:
        shares = [100 * sum(r.conflicts(limit) for r in some) / len(some) for some in pairs.values()]
        table.add_row(f"{limit:g}", *(f"{s:.0f}" for s in shares))
    middle = [sorted(r.cosine or 0.0 for r in some)[len(some) // 2] for some in pairs.values()]
    table.add_row("median cosine", *(f"{c:.2f}" for c in middle))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(SHIPPED_MODEL))
    parser.add_argument("--cases", type=int, default=20, help="edits of each kind, and pairs, in each half")
    parser.add_argument(
        "--halves", nargs="*", default=["choose", "report"], help="of the facts (default: both)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lab = Lab(args)
    console.print(f"{Path(args.model).name}, {args.cases} of each kind; limits: {Guard()}")
    for half in args.halves:
        some = lab.halves[half][: args.cases]
        cases = {kind: lab.tried(kind, some) for kind in ("good", *BAD)}
        others = {kind: lab.tried(kind, some) for kind in ("erase", "amplify")}
        console.print(rates(cases, half), figures(cases | others))
        console.print(conflicts(lab.pairs(half, args.cases), half))


if __name__ == "__main__":
    main()
