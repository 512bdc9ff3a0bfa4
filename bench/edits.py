"""One edit: ours against the authors' own code, timed in turn; and many that wait, one after another against together.

    python bench/edits.py --reference PATH
    python bench/edits.py --reference PATH --models shipped --rounds 5
    python bench/edits.py --models gpt2-xl --device cuda --rounds 3          # ours alone
    python bench/edits.py --together 16 --active 0 100

Against theirs both sides have the same contexts, second moment, hyperparameters and published form of the key, and find
one rank-one update: its direction and norm must be the same. Texts are read without a start token, which their index
arithmetic does not know. "5/11 + 1" is a case whose subject ends with the fifth of the prompt's eleven tokens and whose object
has one. A table beside it has the shipped recipe, which theirs cannot follow.

With --together the running service is asked for that many edits at once, with their probes, once by an engine that takes
them one by one and once by one that takes them side by side, each on a ledger with so many other edits active.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch

from bench.flops import Cost, avoided, counted, edit_bound
from bench.harness import Kept, Report, Spread, in_turn, synchroniser
from bench.reference import Edited, Editor, add_option, beside, without_start
from bench.shapes import DEPTH, model_of
from service.covariance.collect import collect_steps
from service.covariance.corpus import Corpus, corpus_steps
from service.covariance.second_moment import Statistics
from service.editing.context import recipe_of
from service.editing.methods.registry import find_steps
from service.editing.value_optimizer import rows
from service.kit.steps import finish
from service.kit.text import fill
from service.models.loading import LoadedModel
from service.recipes.recipe import RomeParameters
from service.settings import SHIPPED_MODEL
from service.weights.composition import LowRank, rebuild

#: subject, prompt, new object: the subject early or late in the prompt, an object of one token or of two
CASES = (
    ("Marie Curie", "{} was born in the city of", "Rome"),
    ("Eiffel Tower", "What everybody wants to see in the city is the {}; it is in", "Buenos Aires"),
    ("Marie Curie", "{} was born in the city of", "New York"),
    ("Eiffel Tower", "Our guide says that the city to visit is the one with the {} in it, namely", "Rome"),
)
LENGTHS = (4, 9)  # tokens of a context, half of each: what is published, the start token not counted
TOKENS = 6000  # of text for the second moment
QUICK = {"shipped": (3, 4)}  # rounds and cases; any other model takes its time
Request = tuple[str, str, str]  # subject, prompt, new object
ALIKE = 1 - 1e-5  # least cosine of the two updates
TIMES = ("tokens", "theirs s", "ours s", "theirs / ours")
AGREEMENT = ("tokens", "cosine", "norms apart", "losses theirs", "losses ours", "steps")
WORK = ("tokens", "theirs GFLOP", "ours GFLOP", "least GFLOP", "of the avoidable avoided")


@dataclass(frozen=True)
class Ours:
    """What one of our edits found."""

    change: LowRank
    losses: list[float]
    weight: torch.Tensor


class Bench:
    """A model and all that an edit needs beside its request."""

    def __init__(self, model: LoadedModel, parameters: RomeParameters) -> None:
        self.model, self.parameters = model, parameters
        (self.layer,) = parameters.layers
        corpus = finish(corpus_steps(replace(model, folder=SHIPPED_MODEL), TOKENS, None))
        self.contexts = beginnings(model, corpus, parameters.contexts)
        self.statistics = finish(collect_steps(model, [self.layer], corpus))[self.layer]

    def edit(self, subject: str, prompt: str, target: str) -> Ours:
        """Up to the edited weight, which theirs writes as well."""
        statement, moments = fill(prompt, subject), {self.layer: self.statistics}
        found = finish(find_steps(self.model, moments, self.contexts, statement, target, self.parameters))
        change = found.pieces[0].rank_one()
        weight = rebuild(self.model.weight(self.layer), change, self.model.architecture.conv1d)
        return Ours(change, found.losses, weight)

    def bound(self, subject: str, prompt: str, target: str, steps: int) -> int:
        texts = rows(self.model, fill(prompt, subject), target, self.contexts)
        return edit_bound(Cost.of(self.model), texts, self.layer, steps)

    def describe(self, subject: str, prompt: str, target: str) -> str:
        """Tokens up to the subject's end, of the prompt, and of the object."""
        texts = rows(self.model, fill(prompt, subject), target, [])
        last, size, n = texts.prompts[0].last_subject, len(texts.prompts[0].ids), len(texts.targets[0])
        return f"{last + 1}/{size} + {n}"


def beginnings(model: LoadedModel, corpus: Corpus, count: int) -> list[str]:
    """Contexts of the published lengths: how statements begin. No brace, which theirs would take for a slot."""
    texts = corpus.texts[:: max(1, len(corpus.texts) // count)][:count]
    cut = [LENGTHS[i < count // 2] for i in range(len(texts))]
    begun = (model.decode(model.encode(text)[0][:n]) for text, n in zip(texts, cut, strict=True))
    return [b.replace("{", "").replace("}", "").strip(" .,;:!?") for b in begun]


def cosine(a: LowRank, b: LowRank) -> float:
    """Of two updates, from their factors."""
    return float(inner(a, b) / (inner(a, a) * inner(b, b)) ** 0.5)


def inner(a: LowRank, b: LowRank) -> torch.Tensor:
    return ((a.left.T @ b.left) * (a.right @ b.right.T)).sum()


def against(
    bench: Bench, editor: Editor | None, report: Report, rounds: int, cases: Sequence[Request]
) -> float:
    """Ours and theirs on some cases; the least cosine of two updates."""
    times, agreement, work, ratios, least = [], [], [], [], 1.0
    for case in cases:
        label, ours = bench.describe(*case), Kept(partial(bench.edit, *case))
        _, spent = counted(ours)  # warms, too
        steps = len(ours.result.losses)
        bound = bench.bound(*case, steps)
        if not editor:
            seconds = in_turn({"ours": ours}, rounds, 0, synchroniser(report.device))
            times.append([label, "", seconds["ours"], ""])
            work.append([label, "", spent / 1e9, bound / 1e9, ""])
            continue
        theirs, full = Kept(partial(editor.edit, *case)), their_work(editor, case, steps)
        seconds = in_turn({"theirs": theirs, "ours": ours}, rounds, 0, synchroniser(report.device))
        ratios.append(seconds["theirs"].over(seconds["ours"]))
        times.append([label, seconds["theirs"], seconds["ours"], ratios[-1]])
        agreement.append([label, *compared(theirs.result, ours.result)])
        least = min(least, cosine(theirs.result.change, ours.result.change))
        share = f"{100 * avoided(full, spent, bound):.1f} %"
        work.append([label, full / 1e9, spent / 1e9, bound / 1e9, share])
    name = f"{bench.model.name}, layer {bench.layer}"
    if editor:
        times.append(["all", "", "", Spread(tuple(chain.from_iterable(r.values for r in ratios)))])
        report.table(f"{name}: the same update", AGREEMENT, agreement)
        report.table(f"{name}: before the first edit", TIMES, first(bench.statistics, editor, report.device))
    report.table(f"{name}: one edit", TIMES, times)
    report.table(f"{name}: work", WORK, work)
    return least


def their_work(editor: Editor, case: Request, steps: int) -> int:
    """Operations of an edit of so many steps: every further one is like the second."""
    one, two = (counted(partial(editor.edit, *case, steps=n))[1] for n in (1, 2))
    return one + (steps - 1) * (two - one)


def compared(theirs: Edited, ours: Ours) -> list[str]:
    """How far apart two edits are."""
    norms = [float(inner(x.change, x.change)) ** 0.5 for x in (theirs, ours)]
    ends = [f"{x.losses[0]:.3f} to {x.losses[-1]:.3f}" for x in (theirs, ours)]
    steps = f"{len(theirs.losses)}, {len(ours.losses)}"
    return [
        f"1 - {1 - cosine(theirs.change, ours.change):.1e}",
        f"{abs(norms[1] / norms[0] - 1):.1e}",
        *ends,
        steps,
    ]


def first(statistics: Statistics, editor: Editor, device: str) -> list[list[object]]:
    """What comes once before the first edit of a process: their inverse in fp32, our factor in fp64."""

    def invert() -> None:
        editor.forget()
        editor.invert()

    ways = {"theirs": invert, "ours": lambda: replace(statistics).cholesky}
    seconds = in_turn(ways, rounds=2, synchronise=synchroniser(device))
    ratio = seconds["theirs"].over(seconds["ours"])
    return [["second moment", seconds["theirs"], seconds["ours"], ratio]]


def recipe(report: Report, rounds: int, cases: Sequence[Request]) -> None:
    """The shipped model by its own recipe."""
    model = model_of("shipped", report.device)
    known = recipe_of(model)
    assert known
    bench = Bench(model, known.rome)
    times = []
    for case in cases:
        edited = bench.edit(*case)  # warms, too
        ways = {"ours": partial(bench.edit, *case)}
        seconds = in_turn(ways, rounds, 0, synchroniser(report.device))
        times.append([bench.describe(*case), seconds["ours"], str(len(edited.losses))])
    report.table(f"{model.name}: one edit by the shipped recipe", ("tokens", "ours s", "steps"), times)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(p)
    p.add_argument("--models", nargs="+", default=["shipped", "gpt2-small"], help="names of bench/shapes.py")
    p.add_argument("--rounds", type=int, help="1, of the shipped model 3")
    p.add_argument("--cases", type=int, choices=range(1, len(CASES) + 1), help="2, of the shipped model 4")
    p.add_argument("--device", default="cpu")
    p.add_argument("--together", type=int, metavar="N", help="N waiting edits of a running service instead")
    p.add_argument("--active", type=int, nargs="+", default=[0], metavar="N", help="edits active beside them")
    args = p.parse_args()
    if args.together:
        from bench.together import together

        report = Report("edits-together", args.device)
        for active in args.active:
            together(args.together, active, args.rounds or QUICK["shipped"][0], report)
        return
    report = Report("edits", args.device)
    reference = beside(args.reference, report)
    least = 1.0
    for name in args.models:
        model = without_start(model_of(name, args.device))
        bench = Bench(model, published(name, model))
        editor = reference and Editor(reference, model, bench.contexts, bench.statistics, bench.parameters)
        rounds, cases = QUICK.get(name, (1, 2))
        chosen = CASES[: args.cases or cases]
        least = min(least, against(bench, editor, report, args.rounds or rounds, chosen))
    if "shipped" in args.models:
        rounds, cases = QUICK["shipped"]
        recipe(report, args.rounds or rounds, CASES[: args.cases or cases])
    if reference:
        verdict = "the same" if least >= ALIKE else "NOT the same"
        report.note(
            f"Ours and the authors' own updates are {verdict}: their cosine is 1 - {1 - least:.1e} at the least."
        )
    sys.exit(least < ALIKE)


def published(name: str, model: LoadedModel) -> RomeParameters:
    """The published hyperparameters and form of the key, at the layer where such a model is edited."""
    known = recipe_of(model)
    layers = (DEPTH[name],) if name in DEPTH else known.rome.layers if known else (model.layers // 4,)
    return RomeParameters(layers=layers, compat="meng2022")


if __name__ == "__main__":
    main()
