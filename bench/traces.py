"""Causal traces: ours against the authors' own code on the same noise, timed in turn.

    python bench/traces.py --reference PATH
    python bench/traces.py --reference PATH --models shipped --rounds 5 --prompts 2
    python bench/traces.py --models gpt2-xl --device cuda --rounds 3          # ours alone

One map of each kind, all three together, and the severed paths. The scores of the maps must be the same on both sides; those
of severed paths are not compared, because theirs hold what was seen under other noise. Three kinds share nothing in
theirs, so their "all three" is the sum of their three calls of a round. Texts are read without a start token, which
their index arithmetic does not know.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import torch

from bench.flops import Cost, avoided, counted, trace_bound
from bench.harness import Kept, Report, Spread, in_turn, synchroniser
from bench.reference import Reference, Tracer, add_option, beside, without_start
from bench.shapes import model_of
from service.kit.steps import finish
from service.kit.text import find
from service.models.loading import LoadedModel
from service.tracing.fast_trace import trace_steps
from service.tracing.interventions import cells_of
from service.tracing.reference import CUTS, KINDS
from service.tracing.result import TraceResult
from service.tracing.trace_input import ask

PROMPTS = (
    ("Marie Curie was born in", "Marie Curie"),
    ("Our guide says that the Eiffel Tower is in the city of", "Eiffel Tower"),
)
QUICK = {"shipped": (2, 2)}  # rounds and prompts; any other model takes its time
TOLERANCE = 1e-4  # of a score, which is a probability
SEVERED = "severed"
ALL = "all three"
ASKED: dict[str, tuple[tuple[str, ...], bool]] = {
    **{kind: ((kind,), False) for kind in KINDS},
    ALL: (KINDS, False),
    SEVERED: ((), True),
}
TIMES = ("what", "theirs s", "ours s", "theirs / ours", "greatest difference")
WORK = ("what", "theirs GFLOP", "ours GFLOP", "least GFLOP", "of the avoidable avoided")


class Bench:
    """One prompt on one model."""

    def __init__(self, model: LoadedModel, reference: Reference | None, text: str, subject: str) -> None:
        self.model, self.text, self.subject = model, text, subject
        self.statement = find(text, subject)
        self.question = ask(model, self.statement, None, 10, "3sigma", 1, "meng2022", ())
        self.tracer = Tracer(reference, model) if reference else None

    @property
    def title(self) -> str:
        q = self.question
        return f"{self.model.name}: {q.length} tokens, subject {q.subject[0]} to {q.subject[1] - 1}"

    def ours(self, what: str) -> TraceResult:
        kinds, severed = ASKED[what]
        noise = self.question.level.value
        return finish(
            trace_steps(
                self.model, self.statement, kinds=kinds, severed=severed, noise=noise, compat="meng2022"
            )
        )

    def theirs(self, what: str) -> dict[str, torch.Tensor]:
        """Their map of a kind, or their severed paths by what is cut."""
        assert self.tracer
        noise = self.question.level.value
        if what == SEVERED:
            return {cut: self.tracer.severed(self.text, self.subject, cut, noise) for cut in CUTS}
        return {what: self.tracer.flow(self.text, self.subject, what, noise)}

    def their_work(self, what: str) -> int:
        """Operations of `theirs`. All passes of a map are alike, so one token's row tells what all cost."""
        assert self.tracer
        if what == SEVERED:
            return counted(partial(self.theirs, what))[1]
        noise, layers = self.question.level.value, self.model.layers
        row = partial(self.tracer.flow, self.text, self.subject, what, noise, "subject_last")
        return counted(row)[1] * (self.question.length * layers + 2) // (layers + 2)

    def bound(self, what: str) -> int:
        kinds, severed = ASKED[what]
        cells = cells_of(self.question, kinds, 10, severed, self.model.layers)
        return trace_bound(Cost.of(self.model), self.question, cells, self.model.architecture.parallel)


def measure(bench: Bench, report: Report, rounds: int) -> float:
    """Two tables, of time and of work; the greatest difference of two scores."""
    called = [*KINDS, SEVERED] if bench.tracer else []
    ours = {what: counted(partial(bench.ours, what)) for what in ASKED}  # warms, too
    full = {what: bench.their_work(what) for what in called}
    theirs = {what: Kept(partial(bench.theirs, what)) for what in called}
    ways: dict[str, Callable[[], object]] = {f"ours {what}": partial(bench.ours, what) for what in ASKED}
    ways |= {f"theirs {what}": way for what, way in theirs.items()}
    seconds = in_turn(ways, rounds, warm=0, synchronise=synchroniser(report.device))
    maps = {kind: theirs[kind].result[kind] for kind in KINDS if called}
    times, work, worst = [], [], 0.0
    for what, (result, spent) in ours.items():
        took, least = seconds[f"ours {what}"], bench.bound(what)
        if not called:
            times.append([what, "", took, "", ""])
            work.append([what, "", spent / 1e9, least / 1e9, ""])
            continue
        parts = KINDS if what == ALL else (what,)  # of theirs
        slow = _sum([seconds[f"theirs {part}"] for part in parts])
        shown = "not compared"
        if result.scores:
            apart, part = difference(maps, result)
            worst, shown = max(worst, apart), f"{apart:.1e}, {part:.1e} of it"
        times.append([what, slow, took, slow.over(took), shown])
        whole = sum(full[part] for part in parts)
        share = f"{100 * avoided(whole, spent, least):.1f} %"
        work.append([what, whole / 1e9, spent / 1e9, least / 1e9, share])
    report.table(f"{bench.title}: seconds", TIMES, times)
    report.table(f"{bench.title}: work", WORK, work)
    return worst


def difference(theirs: Mapping[str, torch.Tensor], ours: TraceResult) -> tuple[float, float]:
    """The greatest difference of two scores of one cell, and the greatest as a part of the score."""
    pairs = [(torch.tensor(grid), theirs[kind]) for kind, grid in ours.scores.items()]
    apart = [((a - b).abs().max().item(), ((a - b) / b).abs().max().item()) for a, b in pairs]
    return max(x for x, _ in apart), max(x for _, x in apart)


def _sum(spreads: Sequence[Spread]) -> Spread:
    return reduce(lambda a, b: Spread(tuple(x + y for x, y in zip(a.values, b.values, strict=True))), spreads)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(p)
    p.add_argument("--models", nargs="+", default=["shipped", "gpt2-small"], help="names of bench/shapes.py")
    p.add_argument("--rounds", type=int, help="1, of the shipped model 2")
    p.add_argument(
        "--prompts", type=int, choices=range(1, len(PROMPTS) + 1), help="1, of the shipped model 2"
    )
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    report = Report("traces", args.device)
    reference = beside(args.reference, report)
    worst = 0.0
    for name in args.models:
        rounds, prompts = QUICK.get(name, (1, 1))
        model = without_start(model_of(name, args.device))
        for text, subject in PROMPTS[: args.prompts or prompts]:
            bench = Bench(model, reference, text, subject)
            worst = max(worst, measure(bench, report, args.rounds or rounds))
    if reference:
        verdict = "within" if worst <= TOLERANCE else "NOT WITHIN"
        report.note(f"All scores of the maps are {verdict} {TOLERANCE:g} of the authors' own: {worst:.1e}.")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
