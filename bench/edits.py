"""Single edits compared with the authors' code, and queued edits, run in sequence and in batches.

    python bench/edits.py --reference PATH
    python bench/edits.py --reference PATH --models shipped --rounds 5
    python bench/edits.py --models gpt2-xl --device cuda --rounds 3          # without the reference
    python bench/edits.py --batch-size 16 --active 0 100

Both implementations have the same contexts, second moment, hyperparameters and published form of the key.
They compute one rank-one update, whose direction and norm must agree. Texts have no BOS token, which the
index arithmetic of the authors' code does not handle. "5/11 + 1" is a case whose subject ends with the fifth
of eleven prompt tokens and whose object has one token. A second table has the shipped recipe, which the
authors' code does not support.

With --batch-size, that many edits are submitted at once to a running service: once to an engine that runs
them in sequence, and once to an engine that runs them as a batch, on ledgers with --active other edits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch

from bench.flops import TokenCost, avoided_fraction, count_flops, edit_bound
from bench.harness import Report, ResultRecorder, Spread, device_synchronizer, time_interleaved
from bench.meng_reference import (
    ReferenceEdit,
    ReferenceEditor,
    add_reference_option,
    load_reference,
    without_bos,
)
from bench.model_shapes import EDIT_LAYERS, build_model
from service.covariance.collect import collect_statistics
from service.covariance.corpus import Corpus, load_corpus
from service.covariance.second_moment import KeyStatistics
from service.editing.context import find_recipe
from service.editing.find_factors import find_factors
from service.editing.tokenized_contexts import tokenize_contexts
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.settings import SHIPPED_MODEL
from service.weights.composition import apply_delta
from service.weights.factors import Association, LowRank

#: subject, prompt, new object; subjects early and late in the prompt, objects of one and two tokens
CASES = (
    ("Marie Curie", "{} was born in the city of", "Rome"),
    ("Eiffel Tower", "What everybody wants to see in the city is the {}; it is in", "Buenos Aires"),
    ("Marie Curie", "{} was born in the city of", "New York"),
    ("Eiffel Tower", "Our guide says that the city to visit is the one with the {} in it, namely", "Rome"),
)
CONTEXT_LENGTHS = (4, 9)  # tokens of a context, half of each (ROME, Meng et al. 2022), without the BOS token
STATISTICS_TOKENS = 6000  # tokens of text for the second moment
QUICK_SETTINGS = {"shipped": (3, 4)}  # rounds and cases; other models have one round
EditCase = tuple[str, str, str]  # subject, prompt, new object
MIN_COSINE = 1 - 1e-5  # minimum cosine of the two updates
TIME_COLUMNS = ("tokens", "theirs s", "ours s", "theirs / ours")
AGREEMENT_COLUMNS = ("tokens", "cosine", "norm difference", "losses theirs", "losses ours", "steps")
FLOP_COLUMNS = ("tokens", "theirs GFLOP", "ours GFLOP", "bound GFLOP", "avoidable work avoided")


@dataclass(frozen=True)
class ServiceEdit:
    """The update of one edit."""

    change: LowRank
    losses: list[float]
    weight: torch.Tensor


class EditBenchmark:
    """A model with the contexts and statistics of its edits."""

    def __init__(self, model: LoadedModel, parameters: RomeParameters) -> None:
        self.model, self.parameters = model, parameters
        (self.layer,) = parameters.layers
        corpus = run_to_completion(load_corpus(replace(model, folder=SHIPPED_MODEL), STATISTICS_TOKENS, None))
        self.contexts = context_prefixes(model, corpus, parameters.contexts)
        self.statistics = run_to_completion(collect_statistics(model, [self.layer], corpus))[self.layer]

    def edit(self, subject: str, prompt: str, target: str) -> ServiceEdit:
        """Compute an edit up to the edited weight, as the authors' code does."""
        statement, moments = fill_prompt(prompt, subject), {self.layer: self.statistics}
        factors = run_to_completion(
            find_factors(self.model, moments, self.contexts, statement, target, self.parameters)
        )
        (update,) = factors.updates
        assert isinstance(update, Association)
        change = update.rank_one()
        weight = apply_delta(self.model.weight(self.layer), change, self.model.architecture.conv1d)
        return ServiceEdit(change, factors.losses, weight)

    def bound(self, subject: str, prompt: str, target: str, steps: int) -> int:
        texts = tokenize_contexts(self.model, fill_prompt(prompt, subject), target, self.contexts)
        return edit_bound(TokenCost.from_model(self.model), texts, self.layer, steps)

    def describe(self, subject: str, prompt: str, target: str) -> str:
        """Return the token counts up to the end of the subject, of the prompt, and of the object."""
        texts = tokenize_contexts(self.model, fill_prompt(prompt, subject), target, [])
        last, size, n = texts.prompts[0].last_subject_index, len(texts.prompts[0].ids), len(texts.targets[0])
        return f"{last + 1}/{size} + {n}"


def context_prefixes(model: LoadedModel, corpus: Corpus, count: int) -> list[str]:
    """Return contexts of the published lengths: beginnings of statements, without braces, which the authors' code
    formats."""
    texts = corpus.texts[:: max(1, len(corpus.texts) // count)][:count]
    lengths = [CONTEXT_LENGTHS[i < count // 2] for i in range(len(texts))]
    prefixes = (model.decode(model.encode(text)[0][:n]) for text, n in zip(texts, lengths, strict=True))
    return [b.replace("{", "").replace("}", "").strip(" .,;:!?") for b in prefixes]


def cosine(a: LowRank, b: LowRank) -> float:
    """Return the cosine of two updates, computed from their factors."""
    return float(frobenius_inner(a, b) / (frobenius_inner(a, a) * frobenius_inner(b, b)) ** 0.5)


def frobenius_inner(a: LowRank, b: LowRank) -> torch.Tensor:
    return ((a.left.T @ b.left) * (a.right @ b.right.T)).sum()


def compare_implementations(
    bench: EditBenchmark,
    reference_editor: ReferenceEditor | None,
    report: Report,
    rounds: int,
    cases: Sequence[EditCase],
) -> float:
    """Report both implementations on the cases. Return the minimum cosine of two updates."""
    times, agreement, work, ratios, least_cosine = [], [], [], [], 1.0
    for case in cases:
        label, ours = bench.describe(*case), ResultRecorder(partial(bench.edit, *case))
        _, flops = count_flops(ours)  # also the warm-up
        steps = len(ours.result.losses)
        bound = bench.bound(*case, steps)
        if not reference_editor:
            seconds = time_interleaved({"ours": ours}, rounds, 0, device_synchronizer(report.device))
            times.append([label, "", seconds["ours"], ""])
            work.append([label, "", flops / 1e9, bound / 1e9, ""])
            continue
        theirs, reference_work = (
            ResultRecorder(partial(reference_editor.edit, *case)),
            reference_flops(reference_editor, case, steps),
        )
        seconds = time_interleaved(
            {"theirs": theirs, "ours": ours}, rounds, 0, device_synchronizer(report.device)
        )
        ratios.append(seconds["theirs"].ratio_to(seconds["ours"]))
        times.append([label, seconds["theirs"], seconds["ours"], ratios[-1]])
        agreement.append([label, *agreement_row(theirs.result, ours.result)])
        least_cosine = min(least_cosine, cosine(theirs.result.change, ours.result.change))
        share = f"{100 * avoided_fraction(reference_work, flops, bound):.1f} %"
        work.append([label, reference_work / 1e9, flops / 1e9, bound / 1e9, share])
    name = f"{bench.model.name}, layer {bench.layer}"
    if reference_editor:
        times.append(["all", "", "", Spread(tuple(chain.from_iterable(r.values for r in ratios)))])
        report.add_table(f"{name}: agreement of the updates", AGREEMENT_COLUMNS, agreement)
        report.add_table(
            f"{name}: before the first edit",
            TIME_COLUMNS,
            time_setup(bench.statistics, reference_editor, report.device),
        )
    report.add_table(f"{name}: one edit", TIME_COLUMNS, times)
    report.add_table(f"{name}: work", FLOP_COLUMNS, work)
    return least_cosine


def reference_flops(reference_editor: ReferenceEditor, case: EditCase, steps: int) -> int:
    """Return the operations of an edit of `steps` steps, extrapolated from one and two steps."""
    one, two = (count_flops(partial(reference_editor.edit, *case, steps=n))[1] for n in (1, 2))
    return one + (steps - 1) * (two - one)


def agreement_row(theirs: ReferenceEdit, ours: ServiceEdit) -> list[str]:
    """Return the differences of two edits as cells of a table."""
    norms = [float(frobenius_inner(x.change, x.change)) ** 0.5 for x in (theirs, ours)]
    loss_ranges = [f"{x.losses[0]:.3f} to {x.losses[-1]:.3f}" for x in (theirs, ours)]
    steps = f"{len(theirs.losses)}, {len(ours.losses)}"
    return [
        f"1 - {1 - cosine(theirs.change, ours.change):.1e}",
        f"{abs(norms[1] / norms[0] - 1):.1e}",
        *loss_ranges,
        steps,
    ]


def time_setup(
    statistics: KeyStatistics, reference_editor: ReferenceEditor, device: str
) -> list[list[object]]:
    """Time the setup before the first edit: the fp32 inverse of the reference, the fp64 Cholesky factor of the
    service."""

    def invert() -> None:
        reference_editor.clear_inverse_cache()
        reference_editor.compute_inverse()

    ways = {"theirs": invert, "ours": lambda: replace(statistics).cholesky}
    seconds = time_interleaved(ways, rounds=2, synchronise=device_synchronizer(device))
    ratio = seconds["theirs"].ratio_to(seconds["ours"])
    return [["second moment", seconds["theirs"], seconds["ours"], ratio]]


def bench_shipped_recipe(report: Report, rounds: int, cases: Sequence[EditCase]) -> None:
    """Time edits of the shipped model with its own recipe."""
    model = build_model("shipped", report.device)
    model_recipe = find_recipe(model)
    assert model_recipe
    bench = EditBenchmark(model, model_recipe.rome)
    times = []
    for case in cases:
        edit_result = bench.edit(*case)  # also the warm-up
        ways = {"ours": partial(bench.edit, *case)}
        seconds = time_interleaved(ways, rounds, 0, device_synchronizer(report.device))
        times.append([bench.describe(*case), seconds["ours"], str(len(edit_result.losses))])
    report.add_table(f"{model.name}: one edit by the shipped recipe", ("tokens", "ours s", "steps"), times)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reference_option(p)
    p.add_argument(
        "--models", nargs="+", default=["shipped", "gpt2-small"], help="names of bench/model_shapes.py"
    )
    p.add_argument("--rounds", type=int, help="default: 1; for the shipped model 3")
    p.add_argument(
        "--cases", type=int, choices=range(1, len(CASES) + 1), help="default: 2; for the shipped model 4"
    )
    p.add_argument("--device", default="cpu")
    p.add_argument(
        "--batch-size", type=int, metavar="N", help="time N queued edits of a running service instead"
    )
    p.add_argument("--active", type=int, nargs="+", default=[0], metavar="N", help="other active edits")
    args = p.parse_args()
    if args.batch_size:
        from bench.batched_edits import bench_batched_edits

        report = Report("edits-batched", args.device)
        for active in args.active:
            bench_batched_edits(args.batch_size, active, args.rounds or QUICK_SETTINGS["shipped"][0], report)
        return
    report = Report("edits", args.device)
    reference = load_reference(args.reference, report)
    least_cosine = 1.0
    for name in args.models:
        model = without_bos(build_model(name, args.device))
        bench = EditBenchmark(model, published_parameters(name, model))
        reference_editor = (
            ReferenceEditor(reference, model, bench.contexts, bench.statistics, bench.parameters)
            if reference
            else None
        )
        rounds, cases = QUICK_SETTINGS.get(name, (1, 2))
        selected_cases = CASES[: args.cases or cases]
        least_cosine = min(
            least_cosine,
            compare_implementations(bench, reference_editor, report, args.rounds or rounds, selected_cases),
        )
    if "shipped" in args.models:
        rounds, cases = QUICK_SETTINGS["shipped"]
        bench_shipped_recipe(report, args.rounds or rounds, CASES[: args.cases or cases])
    if reference:
        verdict = "agree" if least_cosine >= MIN_COSINE else "DO NOT agree"
        report.add_note(
            f"The updates of both implementations {verdict}: their minimum cosine is 1 - {1 - least_cosine:.1e}."
        )
    sys.exit(least_cosine < MIN_COSINE)


def published_parameters(name: str, model: LoadedModel) -> RomeParameters:
    """Return the published hyperparameters and form of the key, at the published layer of the model."""
    model_recipe = find_recipe(model)
    layers = (
        (EDIT_LAYERS[name],)
        if name in EDIT_LAYERS
        else model_recipe.rome.layers
        if model_recipe
        else (model.num_layers // 4,)
    )
    return RomeParameters(layers=layers, compat="meng2022")


if __name__ == "__main__":
    main()
