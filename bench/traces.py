"""Causal traces, compared with the authors' code on the same noise.

    python bench/traces.py --reference PATH
    python bench/traces.py --reference PATH --models shipped --rounds 5 --prompts 2
    python bench/traces.py --models gpt2-xl --device cuda --rounds 3          # without the reference

The bench measures one map of each kind, all three maps together, and the severed paths. The scores of the
maps must agree. Scores of severed paths are not compared, because the authors' code holds outputs of other
noise. Its three kinds share no work, so its "all three" is the sum of three calls. Texts have no BOS token,
which its index arithmetic does not handle.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import torch

from bench.flops import TokenCost, avoided_fraction, count_flops, trace_bound
from bench.harness import Report, ResultRecorder, Spread, device_synchronizer, time_interleaved
from bench.meng_reference import Reference, ReferenceTracer, add_reference_option, load_reference, without_bos
from bench.model_shapes import build_model
from service.kit.steps import run_to_completion
from service.kit.text import locate_subject
from service.models.loading import LoadedModel
from service.tracing.fast_trace import trace_statement
from service.tracing.interventions import list_cells
from service.tracing.reference import SEVERABLE_KINDS, TRACE_KINDS
from service.tracing.result import TraceResult
from service.tracing.trace_input import build_trace_input

PROMPTS = (
    ("Marie Curie was born in", "Marie Curie"),
    ("Our guide says that the Eiffel Tower is in the city of", "Eiffel Tower"),
)
QUICK_SETTINGS = {"shipped": (2, 2)}  # rounds and prompts; other models have one of each
TOLERANCE = 1e-4  # of a score, a probability
SEVERED = "severed"
ALL = "all three"
TRACE_VARIANTS: dict[str, tuple[tuple[str, ...], bool]] = {
    **{kind: ((kind,), False) for kind in TRACE_KINDS},
    ALL: (TRACE_KINDS, False),
    SEVERED: ((), True),
}
TIME_COLUMNS = ("trace", "theirs s", "ours s", "theirs / ours", "max difference")
FLOP_COLUMNS = ("trace", "theirs GFLOP", "ours GFLOP", "bound GFLOP", "avoidable work avoided")


class TraceBenchmark:
    """One prompt on one model."""

    def __init__(self, model: LoadedModel, reference: Reference | None, text: str, subject: str) -> None:
        self.model, self.text, self.subject = model, text, subject
        self.statement = locate_subject(text, subject)
        self.question = build_trace_input(model, self.statement, None, 10, "3sigma", 1, "meng2022", ())
        self.tracer = ReferenceTracer(reference, model) if reference else None

    @property
    def title(self) -> str:
        q = self.question
        return f"{self.model.name}: {q.prompt_length} tokens, subject {q.subject[0]} to {q.subject[1] - 1}"

    def ours(self, what: str) -> TraceResult:
        kinds, severed = TRACE_VARIANTS[what]
        noise = self.question.noise_level.value
        return run_to_completion(
            trace_statement(
                self.model, self.statement, kinds=kinds, severed=severed, noise=noise, compat="meng2022"
            )
        )

    def theirs(self, what: str) -> dict[str, torch.Tensor]:
        """Return the reference's map of a kind, or its severed paths by the cut module."""
        assert self.tracer
        noise = self.question.noise_level.value
        if what == SEVERED:
            return {cut: self.tracer.severed(self.text, self.subject, cut, noise) for cut in SEVERABLE_KINDS}
        return {what: self.tracer.trace_map(self.text, self.subject, what, noise)}

    def reference_flops(self, what: str) -> int:
        """Return the operations of `theirs`, extrapolated from one token's row, since all passes of a map cost the
        same."""
        assert self.tracer
        if what == SEVERED:
            return count_flops(partial(self.theirs, what))[1]
        noise, layers = self.question.noise_level.value, self.model.num_layers
        one_row = partial(self.tracer.trace_map, self.text, self.subject, what, noise, "subject_last")
        return count_flops(one_row)[1] * (self.question.prompt_length * layers + 2) // (layers + 2)

    def bound(self, what: str) -> int:
        kinds, severed = TRACE_VARIANTS[what]
        cells = list_cells(self.question, kinds, 10, severed, self.model.num_layers)
        return trace_bound(
            TokenCost.from_model(self.model), self.question, cells, self.model.architecture.parallel
        )


def compare_implementations(bench: TraceBenchmark, report: Report, rounds: int) -> float:
    """Report time and work. Return the largest difference of two scores."""
    reference_variants = [*TRACE_KINDS, SEVERED] if bench.tracer else []
    ours = {what: count_flops(partial(bench.ours, what)) for what in TRACE_VARIANTS}  # also the warm-up
    reference_work = {what: bench.reference_flops(what) for what in reference_variants}
    theirs = {what: ResultRecorder(partial(bench.theirs, what)) for what in reference_variants}
    ways: dict[str, Callable[[], object]] = {
        f"ours {what}": partial(bench.ours, what) for what in TRACE_VARIANTS
    }
    ways |= {f"theirs {what}": way for what, way in theirs.items()}
    seconds = time_interleaved(ways, rounds, warmup=0, synchronise=device_synchronizer(report.device))
    maps = {kind: theirs[kind].result[kind] for kind in TRACE_KINDS if reference_variants}
    times, work, max_difference = [], [], 0.0
    for what, (result, spent) in ours.items():
        our_seconds, least = seconds[f"ours {what}"], bench.bound(what)
        if not reference_variants:
            times.append([what, "", our_seconds, "", ""])
            work.append([what, "", spent / 1e9, least / 1e9, ""])
            continue
        parts = TRACE_KINDS if what == ALL else (what,)  # of the reference
        their_seconds = _sum_spreads([seconds[f"theirs {relative}"] for relative in parts])
        difference_text = "not compared"
        if result.scores:
            absolute, relative = max_score_difference(maps, result)
            max_difference, difference_text = (
                max(max_difference, absolute),
                f"{absolute:.1e}, {relative:.1e} relative",
            )
        times.append([what, their_seconds, our_seconds, their_seconds.ratio_to(our_seconds), difference_text])
        whole = sum(reference_work[relative] for relative in parts)
        share = f"{100 * avoided_fraction(whole, spent, least):.1f} %"
        work.append([what, whole / 1e9, spent / 1e9, least / 1e9, share])
    report.add_table(f"{bench.title}: seconds", TIME_COLUMNS, times)
    report.add_table(f"{bench.title}: work", FLOP_COLUMNS, work)
    return max_difference


def max_score_difference(theirs: Mapping[str, torch.Tensor], ours: TraceResult) -> tuple[float, float]:
    """Return the largest absolute and the largest relative difference of the scores of all cells and
    kinds."""
    pairs = [(torch.tensor(grid), theirs[kind]) for kind, grid in ours.scores.items()]
    apart = [((a - b).abs().max().item(), ((a - b) / b).abs().max().item()) for a, b in pairs]
    return max(x for x, _ in apart), max(x for _, x in apart)


def _sum_spreads(spreads: Sequence[Spread]) -> Spread:
    return reduce(lambda a, b: Spread(tuple(x + y for x, y in zip(a.values, b.values, strict=True))), spreads)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reference_option(p)
    p.add_argument(
        "--models", nargs="+", default=["shipped", "gpt2-small"], help="names of bench/model_shapes.py"
    )
    p.add_argument("--rounds", type=int, help="default: 1; for the shipped model 2")
    p.add_argument(
        "--prompts", type=int, choices=range(1, len(PROMPTS) + 1), help="default: 1; for the shipped model 2"
    )
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    report = Report("traces", args.device)
    reference = load_reference(args.reference, report)
    max_difference = 0.0
    for name in args.models:
        rounds, prompts = QUICK_SETTINGS.get(name, (1, 1))
        model = without_bos(build_model(name, args.device))
        for text, subject in PROMPTS[: args.prompts or prompts]:
            bench = TraceBenchmark(model, reference, text, subject)
            max_difference = max(
                max_difference, compare_implementations(bench, report, args.rounds or rounds)
            )
    if reference:
        verdict = "within" if max_difference <= TOLERANCE else "NOT WITHIN"
        report.add_note(
            f"The scores of the maps are {verdict} {TOLERANCE:g} of the authors' scores: {max_difference:.1e}."
        )
    sys.exit(max_difference > TOLERANCE)


if __name__ == "__main__":
    main()
