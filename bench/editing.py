"""Editing on a table of facts: one edit at a time, pairs about one subject, and many in a row.

    python bench/editing.py single  --cases 200
    python bench/editing.py pairs   --cases 50
    python bench/editing.py many    --cases 100
    python bench/editing.py single  --model FOLDER --data cases.json

Cases come from the model's facts.jsonl (or from --data in CounterFact's form). Those at even places of the seeded order
were used for tuning the shipped recipe; the figures are of those at odd places (--split test, the default).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from service.datasets.records import Record, read_records
from service.editing.context import Toolkit, prepare_steps, recipe_of
from service.editing.methods.registry import find_steps
from service.engine.versioned_model import NoLedger, Replica, Weights
from service.kit.steps import finish
from service.kit.text import fill
from service.models.loading import Site, load
from service.models.scoring import log_probs, perplexity_steps
from service.recipes.recipe import Recipe, RomeParameters
from service.scores.scores import bootstrap, bootstrap_score, share_kept, share_new
from service.settings import SHIPPED_MODEL
from service.weights.composition import Association, LowRank, rebuild

console = Console()
Shares = tuple[float, float, float]


class Lab:
    """A model, its tools and a replica to try sets of associations on."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = load(args.model, args.device)
        self.parameters = self._parameters(args)
        recipe = Recipe(source="bench", rome=self.parameters)
        self.toolkit: Toolkit = finish(
            prepare_steps(self.model, Path(args.stats) if args.stats else None, recipe=recipe)
        )
        self.replica = Replica(self.model, NoLedger())
        self.contexts = finish(self.toolkit.contexts_steps(self.parameters.contexts, self.parameters.seed))
        self.statistics = finish(self.toolkit.statistics_steps(self.parameters.layers))

    def _parameters(self, args: argparse.Namespace) -> RomeParameters:
        recipe = recipe_of(self.model)
        base = recipe.rome.model_dump() if recipe else {"layers": [1], "learning_rate": 0.2, "steps": 25}
        return RomeParameters.model_validate(base | json.loads(args.hparams))

    def find(self, case: Record, name: str, **changes: object) -> list[Association]:
        parameters = self.parameters.model_copy(update=changes)
        steps = find_steps(
            self.model,
            self.statistics,
            self.contexts,
            fill(case.prompt, case.subject),
            case.target_new,
            parameters,
            name,
        )
        return finish(steps).pieces

    def measure(self, cases: Sequence[Record], weights: Weights) -> list[Shares]:
        """(ES, PS, NS) of each case with these weights in place. A case without probes of a kind counts by the others."""
        pairs: list[tuple[str, str]] = []
        for c in cases:
            for prompt in (c.text, *c.paraphrases, *(n.prompt for n in c.neighbours)):
                pairs += [(prompt, c.target_new), (prompt, c.target_true or "")]
        with self.replica.stand(weights):
            scores = iter(log_probs(self.model, pairs))
        records = []
        for c in cases:
            both = [
                (next(scores)[0], next(scores)[0]) for _ in range(1 + len(c.paraphrases) + len(c.neighbours))
            ]
            cut = 1 + len(c.paraphrases)
            es, ps, ns = share_new(both[:1]), share_new(both[1:cut]), share_kept(both[cut:])
            nan = float("nan")
            whole = [nan if x is None else x for x in (es, ps, ns)]
            records.append((whole[0], whole[1], whole[2]))
        return records

    def loss(self, weights: Weights, texts: Sequence[str]) -> float:
        with self.replica.stand(weights):
            return finish(perplexity_steps(self.model, texts))


def show(title: str, records: Sequence[Shares], seconds: Sequence[float] = ()) -> None:
    table = Table(title=title)
    for name in ("", "mean", "95 % interval"):
        table.add_column(name, justify="right")
    for i, name in enumerate(("ES", "PS", "NS")):
        mean, low, high = bootstrap([r[i] for r in records if not math.isnan(r[i])])
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


def single(lab: Lab, cases: Sequence[Record], args: argparse.Namespace) -> None:
    """One edit at a time on the base model; what does not take is strengthened, as the service does."""
    records, seconds, strengthened, failed = [], [], 0, 0
    for case in track(cases, "one edit at a time", console=console, disable=args.quiet):
        began = time.perf_counter()
        found = lab.find(case, "e")
        seconds.append(time.perf_counter() - began)
        for strength in args.strengths:
            record = lab.measure([case], lab.replica.composed(a.scaled(strength) for a in found))[0]
            if record[0] == 1.0:
                break
        strengthened += strength > args.strengths[0] and record[0] == 1.0
        failed += record[0] < 1.0
        records.append(record)
        if args.verbose and (record[0] < 1 or record[1] < 1 or record[2] < 0.9):
            console.print(
                record, case.subject, "|", case.prompt, "|", case.target_true, "->", case.target_new
            )
    show(f"{len(cases)} facts, one edit at a time ({lab.model.name})", records, seconds)
    console.print(f"strengthened: {strengthened}; did not take, the service rejects them: {failed}")


def hold(lab: Lab, cases: Sequence[Record], weights: Weights) -> list[bool]:
    return [r[0] == 1.0 for r in lab.measure(cases, weights)]


def pairs(lab: Lab, cases: Sequence[Record], args: argparse.Namespace) -> None:
    """Pairs of edits about one subject in two relations, all active together."""
    by_subject: dict[str, list[Record]] = defaultdict(list)
    for c in cases:
        by_subject[c.subject].append(c)
    chosen: list[Record] = []
    for group in by_subject.values():
        two = list({c.relation: c for c in group}.values())[:2]
        if len(two) == 2 and len(chosen) < 2 * args.cases:
            chosen += two
    found = [
        lab.find(c, f"{i:04}")
        for i, c in enumerate(track(chosen, "pairs", console=console, disable=args.quiet))
    ]
    table = Table(title=f"{len(chosen) // 2} pairs about one subject, all {len(chosen)} edits active")
    for name in ("composition", "both hold", "first", "second"):
        table.add_column(name, justify="right")
    for name, weights in forms(lab, found, chosen, args).items():
        held = hold(lab, chosen, weights)
        first, second = held[::2], held[1::2]
        both = sum(a and b for a, b in zip(first, second, strict=True))
        n = len(first)
        table.add_row(
            name, f"{100 * both / n:.0f} %", f"{100 * sum(first) / n:.0f} %", f"{100 * sum(second) / n:.0f} %"
        )
    console.print(table)


def summed(lab: Lab, found: Iterable[list[Association]]) -> Weights:
    """Plain sums of the rank-one updates, each found alone."""
    total: dict[int, LowRank] = {}
    for a in (x for group in found for x in group):
        one = a.rank_one()
        old = total.get(a.layer)
        total[a.layer] = (
            one
            if old is None
            else LowRank(torch.cat([old.left, one.left], 1), torch.cat([old.right, one.right]))
        )
    conv1d = lab.model.architecture.conv1d
    return {Site(x): rebuild(lab.model.weight(x).data, change, conv1d) for x, change in total.items()}


def sequential(lab: Lab, cases: Sequence[Record], compat: str | None, quiet: bool) -> Weights:
    """As published: each edit found on the model as the edits before left it, and added to its weights."""
    weights: Weights = {}
    conv1d = lab.model.architecture.conv1d
    for i, c in enumerate(track(cases, f"sequential {compat or 'r-ROME'}", console=console, disable=quiet)):
        with lab.replica.stand(weights):
            found = lab.find(c, f"{i:04}", compat=compat)
            weights = {
                **weights,
                **{a.site: rebuild(lab.model.parameter(a.site).data, a.rank_one(), conv1d) for a in found},
            }
    return weights


def strengthened(
    lab: Lab, found: list[list[Association]], cases: Sequence[Record], strengths: Sequence[float]
) -> list[Association]:
    """Landed one after another as the service does it: each is strengthened until it holds beside those before it.

    None is rejected here, so that every form is measured on the same edits.
    """
    active: list[Association] = []
    for group, case in zip(found, cases, strict=True):
        bare = replace(case, paraphrases=(), neighbours=())
        for strength in strengths:
            mine = [a.scaled(strength) for a in group]
            if hold(lab, [bare], lab.replica.composed([*active, *mine]))[0]:
                break
        active += mine
    return active


def forms(
    lab: Lab, found: list[list[Association]], cases: Sequence[Record], args: argparse.Namespace
) -> dict[str, Weights]:
    """The ways to have many edits active at once."""
    every = [a for group in found for a in group]
    landed = strengthened(lab, found, cases, args.strengths)
    result = {
        "joint, strengthened (the service)": lab.replica.composed(landed),
        "joint": lab.replica.composed(every),
        "factors summed": summed(lab, found),
    }
    if not args.fast:
        result["sequential r-ROME"] = sequential(lab, cases, None, args.quiet)
        result["sequential ROME"] = sequential(lab, cases, "meng2022", args.quiet)
    return result


def many(lab: Lab, cases: Sequence[Record], args: argparse.Namespace) -> None:
    """Many edits in a row, then the same measures over all of them, for each form of composition."""
    chosen = list({c.subject: c for c in reversed(cases)}.values())[: args.cases]
    found = [
        lab.find(c, f"{i:04}")
        for i, c in enumerate(track(chosen, "edits", console=console, disable=args.quiet))
    ]
    touched = {c.text for c in chosen}
    texts = [t for t in lab.toolkit.corpus.texts if not any(t.startswith(p) for p in touched)][::7][:500]
    table = Table(title=f"{len(chosen)} edits active at once ({lab.model.name})")
    for name in ("composition", "ES", "PS", "NS", "S", "S, 95 % interval", "perplexity before", "after"):
        table.add_column(name, justify="right")
    before = lab.loss({}, texts)
    for name, weights in forms(lab, found, chosen, args).items():
        records = lab.measure(chosen, weights)
        whole = [r for r in records if not any(map(math.isnan, r))]
        means = [bootstrap([r[i] for r in records if not math.isnan(r[i])])[0] for i in range(3)]
        score, low, high = bootstrap_score(whole)
        row = [f"{100 * x:.1f}" for x in (*means, score)]
        after = lab.loss(weights, texts)
        table.add_row(name, *row, f"{100 * low:.1f} to {100 * high:.1f}", f"{before:.3f}", f"{after:.3f}")
    console.print(table)
    revert_all(lab, found)


def revert_all(lab: Lab, found: list[list[Association]]) -> None:
    """Take all edits out again in random order; the last state must be the base, byte for byte."""
    active = dict(enumerate(found))
    base = {x: lab.model.weight(x).data.clone() for x in range(lab.model.layers)}
    order = random.Random(0).sample(sorted(active), len(active))
    for i in order:
        del active[i]
        weights = lab.replica.composed(a for group in active.values() for a in group)
    with lab.replica.stand(weights):
        same = all(torch.equal(lab.model.weight(x).data, w) for x, w in base.items())
    console.print(f"all {len(found)} reverted in random order: base bytes {'are back' if same else 'DIFFER'}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["single", "pairs", "many"])
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument(
        "--data", type=Path, help="facts.jsonl or CounterFact JSON; the model's own table when left out"
    )
    p.add_argument("--cases", type=int, default=None)
    p.add_argument("--split", choices=["test", "tune", "all"], default="test")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--hparams", default="{}", help="JSON to change the recipe with")
    p.add_argument("--strengths", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0])
    p.add_argument("--stats", default=None, help="folder that keeps statistics between runs")
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--fast", action="store_true", help="leave the sequential baselines out")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    p.add_argument("--verbose", action="store_true", help="show the cases that fail")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    lab = Lab(args)
    data = args.data or Path(args.model) / "facts.jsonl"
    cases = read_records(data, args.seed)
    cases = {"test": cases[1::2], "tune": cases[0::2], "all": cases}[args.split]
    args.cases = args.cases or {"single": 200, "pairs": 50, "many": 100}[args.what]
    if args.what == "single":
        single(lab, cases[: args.cases], args)
    else:
        {"pairs": pairs, "many": many}[args.what](lab, cases, args)


if __name__ == "__main__":
    main()
