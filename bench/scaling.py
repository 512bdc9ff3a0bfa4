"""Scaling of cost: of a version with its edits, of an edit and a trace with their size, and peak memory.

    python bench/scaling.py
    python bench/scaling.py versions --models shipped gpt2-small --edits 1 10 100 500 1000 2000
    python bench/scaling.py edits traces
    python bench/scaling.py memory --models gpt2-xl --device cuda

Keys are those of the model's corpus at the edited layer, one for each text. Values are random, which does not
affect the cost.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.harness import Report, Spread, device_synchronizer, time_interleaved
from bench.model_shapes import EDIT_LAYERS, build_model
from bench.peak_memory import peak_bytes
from service.covariance.collect import collect_statistics, tokenize_corpus
from service.covariance.corpus import Corpus, load_corpus
from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import build_edit_spec
from service.editing.find_factors import find_batch_factors
from service.engine.decoding import DecodingBatch, new_sequence
from service.engine.versioned_model import VersionedModel
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models import memory_estimates
from service.models.hooks import capture, stop_after
from service.models.loading import LoadedModel, wrap_model
from service.models.token_batch import forward, pad
from service.schemas import GenerateRequest
from service.tracing.fast_trace import FastTracer, trace_statement
from service.tracing.interventions import list_cells
from service.tracing.reference import TRACE_KINDS
from service.tracing.trace_input import build_trace_input
from service.weights.composition import apply_delta, compose_layer
from service.weights.factors import Association, serialize_updates

CONTEXTS = [
    "The first thing to know",
    "In the afternoon they said",
    "It is well known",
    "A letter from the north",
]
SUBJECT = "Marie Curie"
FILLER = "and then there was a long way to go before "
SAMPLES = 5  # of the trace whose memory is measured
MIB = 2**20


def corpus_texts() -> tuple[str, ...]:
    """Return the statements of the shipped model. Every model of the bench uses its tokenizer."""
    return run_to_completion(load_corpus(build_model("shipped"), 60_000, None)).texts


class InMemoryLedger:
    """A ledger in memory. Version n has the first n edits."""

    def __init__(self, packed: Sequence[bytes]) -> None:
        self.packed = packed

    def head(self) -> int:
        return len(self.packed)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        return [(f"{i:05}", {"subject": f"subject {i}"}) for i in range(version)]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {e: self.packed[int(e)] for e in edits}

    def gate_space(self, digest: str) -> bytes:
        raise KeyError(digest)

    def attest(self, version: int, digest: str) -> None:
        """Accept every digest."""


def make_associations(model: LoadedModel, layer: int, texts: Sequence[str], count: int) -> list[Association]:
    """Return associations with keys of the last tokens of texts, directions C^-1 k, and random values."""
    step = max(1, len(texts) // count)
    chosen = [model.encode(t)[0] for t in texts[::step][:count]]
    keys = []
    for start in range(0, len(chosen), 64):
        batch = pad(chosen[start : start + 64], model)
        with (
            capture({0: model.down_proj(layer)}, "input") as captured_inputs,
            stop_after(model.down_proj(layer)),
        ):
            forward(model, batch)
        rows = captured_inputs[0].reshape(*batch.ids.shape, -1)
        keys += [rows[i, n - 1].float().cpu() for i, n in enumerate(batch.lengths)]
    statistics = run_to_completion(collect_statistics(model, [layer], Corpus("bench", tuple(texts[:400]))))[
        layer
    ]
    directions = statistics.solve(torch.stack(keys, 1)).float().T
    generator = torch.Generator().manual_seed(0)
    return [
        Association(
            f"{i:05}",
            f"subject {i}",
            layer,
            k,
            u.contiguous(),
            torch.randn(model.hidden_size, generator=generator),
        )
        for i, (k, u) in enumerate(zip(keys, directions, strict=True))
    ]


def bench_versions(
    name: str, counts: Sequence[int], texts: Sequence[str], rounds: int, report: Report
) -> None:
    """Time the composition of a version from nothing and from the previous version."""
    model = build_model(name, report.device)
    layer = EDIT_LAYERS.get(name, 0)
    all_associations = make_associations(model, layer, texts, max(counts))
    if len(all_associations) < max(counts):
        report.add_note(f"{name}: the corpus has {len(all_associations)} texts; larger versions are skipped.")
    packed = [serialize_updates([a]) for a in all_associations]
    base, conv1d = model.weight(layer).data, model.architecture.conv1d
    wait, times, sizes = device_synchronizer(report.device), [], []
    for n in [n for n in counts if n <= len(all_associations)]:
        seconds_by_stage: dict[str, list[float]] = {}
        for _ in range(rounds):
            replica = VersionedModel(model, InMemoryLedger(packed[:n]))
            first = _time_call(partial(replica.active_updates, n), wait)
            change = _time_call(partial(compose_layer, all_associations[:n]), wait)
            weight = _time_call(partial(apply_delta, base, change[0], conv1d), wait)
            from_nothing = _time_call(
                partial(VersionedModel(model, InMemoryLedger(packed[:n])).digest, n), wait
            )
            one_more = VersionedModel(model, InMemoryLedger(packed[:n]))
            one_more.active_updates(n - 1)
            one_edit_more = _time_call(partial(one_more.digest, n), wait)
            for what, (_, seconds) in {
                "unpack": first,
                "compose": change,
                "rebuild": weight,
                "from nothing": from_nothing,
                "one more": one_edit_more,
            }.items():
                seconds_by_stage.setdefault(what, []).append(seconds)
        times.append(
            [str(n), *(Spread(tuple(v)) for v in seconds_by_stage.values()), compose_flops(model, n) / 1e9]
        )
        peak = peak_bytes(partial(_compose_weight, base, all_associations[:n], conv1d), report.device)
        sizes.append(
            [
                str(n),
                sum(map(len, packed[:n])) / MIB,
                4 * n * (2 * model.intermediate_size + model.hidden_size) / MIB,
                peak / MIB,
                memory_estimates.compose_bytes(model, n) / MIB,
                memory_estimates.version_bytes(model, 1) / MIB,
            ]
        )
    shape = f"{name}, D = {model.intermediate_size}, d = {model.hidden_size}"
    report.add_table(
        f"Versions by their edits ({shape}): seconds",
        ("edits", "unpack", "compose", "rebuild", "from nothing", "one more edit", "GFLOP"),
        times,
    )
    report.add_table(
        f"Versions by their edits ({shape}): MiB",
        ("edits", "in the ledger", "associations", "peak of composing", "estimate", "a kept version"),
        sizes,
    )


def compose_flops(model: LoadedModel, n: int) -> int:
    """Return the fp64 operations of composing n edits of one layer and adding their delta to the weight."""
    d, D = model.hidden_size, model.intermediate_size
    return 2 * n * n * D + 2 * n**3 // 3 + 2 * n * n * d + 2 * n * d * D


def _compose_weight(base: torch.Tensor, active: Sequence[Association], conv1d: bool) -> torch.Tensor:
    return apply_delta(base, compose_layer(active), conv1d)


def _time_call(work: Callable[[], Any], wait: Callable[[], None]) -> tuple[Any, float]:
    wait()
    began = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - began


def prompt_of_length(model: LoadedModel, tokens: int, early: bool = False) -> str:
    """Return a prompt of at least `tokens` tokens, with the subject near the end or, if `early`, at the beginning."""
    prefix, text = ("{} ", "was born in the city of") if early else ("", "{} was born in the city of")
    while prompt_length(model, prefix + text) < tokens:
        text = FILLER + text
    return prefix + text


def prompt_length(model: LoadedModel, prompt: str) -> int:
    return len(model.encode(fill_prompt(prompt, SUBJECT).text)[0])


def with_depth(model: LoadedModel, layers: int) -> LoadedModel:
    """Return a random model of the same shape with `layers` layers."""
    config = copy.deepcopy(model.model.config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device(model.device):
        random_model = AutoModelForCausalLM.from_config(config, dtype=model.weight(0).dtype)
    return wrap_model(random_model, model.tokenizer, f"{model.name}, {layers} layers")


def unit_statistics(model: LoadedModel, layers: Sequence[int]) -> dict[int, KeyStatistics]:
    """Return C = I; the cost of an edit does not depend on C."""
    eye = torch.eye(model.intermediate_size, dtype=torch.float64)
    return {x: KeyStatistics(x, eye, 1, 0.0, "unit") for x in layers}


def edit_task(
    model: LoadedModel, prompt: str, contexts: Sequence[str], layers: Sequence[int], steps: int = 25
) -> Callable[[], object]:
    """Return a function that computes one edit with a fixed number of steps."""
    parameters = RomeParameters(layers=list(layers), steps=steps, stop_loss=0.0, bare_keys=True)
    statistics = unit_statistics(model, layers)
    for s in statistics.values():
        s.solve(torch.ones(model.intermediate_size))
    statement = fill_prompt(prompt, SUBJECT)

    def work() -> object:
        spec = build_edit_spec(model, contexts, statement, "Rome", parameters)
        return run_to_completion(find_batch_factors(model, statistics, [spec]))

    return work


def trace_task(model: LoadedModel, prompt: str, samples: int) -> Callable[[], object]:
    """Return a function that computes one trace of all three kinds."""
    return lambda: run_to_completion(
        trace_statement(model, fill_prompt(prompt, SUBJECT), samples=samples, noise=0.1)
    )


def report_scaling(title: str, tasks: dict[str, Callable[[], object]], rounds: int, report: Report) -> None:
    """Report the seconds of each task and their ratio to the first."""
    seconds = time_interleaved(tasks, rounds, warmup=0, synchronise=device_synchronizer(report.device))
    first = next(iter(seconds.values()))
    report.add_table(
        title, ("", "seconds", "over the first"), [[n, s, s.ratio_to(first)] for n, s in seconds.items()]
    )


def bench_edits(name: str, rounds: int, report: Report) -> None:
    """Time an edit by the length of its prompt, its contexts, its layers, and the depth of the model."""
    model = build_model(name, report.device)
    layer, short = EDIT_LAYERS.get(name, 0), "{} was born in the city of"
    longest = min(model.max_positions - 20, 96)
    late_prompts = {
        prompt_length(model, p): p for n in (8, 24, 48, longest) if (p := prompt_of_length(model, n))
    }
    by_length_late_subject = {
        f"{n} tokens": edit_task(model, p, CONTEXTS, [layer]) for n, p in late_prompts.items()
    }
    report_scaling(
        f"An edit by its prompt's length, the subject close to the end ({name})",
        by_length_late_subject,
        rounds,
        report,
    )
    early_prompts = {
        prompt_length(model, p): p for n in (8, 24, 48) if (p := prompt_of_length(model, n, early=True))
    }
    by_length_early_subject = {
        f"{n} tokens": edit_task(model, p, CONTEXTS, [layer]) for n, p in early_prompts.items()
    }
    report_scaling(
        f"An edit by its prompt's length, the subject at the beginning ({name})",
        by_length_early_subject,
        rounds,
        report,
    )
    by_contexts = {
        f"{n} contexts": edit_task(model, short, (CONTEXTS * 5)[:n], [layer]) for n in (0, 5, 10, 20)
    }
    report_scaling(f"An edit by its contexts ({name})", by_contexts, rounds, report)
    by_layers = {f"{n} layers": edit_task(model, short, CONTEXTS, range(layer, layer + n)) for n in (1, 2, 3)}
    report_scaling(f"An edit by the layers that it writes ({name})", by_layers, rounds, report)
    depths = {f"{n} layers": edit_task(with_depth(model, n), short, CONTEXTS, [0]) for n in (4, 8, 16)}
    report_scaling(f"An edit of layer 0 by the model's depth ({name}'s shape)", depths, rounds, report)


def bench_traces(name: str, rounds: int, report: Report) -> None:
    """Time a trace by its length, samples and depth of the model."""
    model = build_model(name, report.device)
    short = "{} was born in the city of"
    early_prompts = {
        prompt_length(model, p): p for n in (8, 20, 32) if (p := prompt_of_length(model, n, early=True))
    }
    lengths = {f"{n} tokens": trace_task(model, p, 3) for n, p in early_prompts.items()}
    report_scaling(
        f"A trace by its length, the subject at the beginning (3 samples; {name})", lengths, rounds, report
    )
    samples = {f"{n} samples": trace_task(model, short, n) for n in (1, 5, 10)}
    report_scaling(f"A trace by its samples ({name})", samples, rounds, report)
    depths = {f"{n} layers": trace_task(with_depth(model, n), short, 3) for n in (4, 8, 16)}
    report_scaling(f"A trace by the model's depth (3 samples; {name}'s shape)", depths, rounds, report)


def bench_memory(name: str, texts: Sequence[str], report: Report) -> None:
    """Report the peak memory of each task beyond the weights, and the estimate that admission uses."""
    model = build_model(name, report.device)
    layer, short = EDIT_LAYERS.get(name, 0), "{} was born in the city of"
    contexts = (CONTEXTS * 5)[:20]
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters())
    spec = build_edit_spec(
        model, contexts, fill_prompt(short, SUBJECT), "Rome", RomeParameters(layers=[layer], bare_keys=True)
    )
    length = prompt_length(model, short)
    request = GenerateRequest(prompts=list(texts[:16]), max_new_tokens=16, temperature=0.7, seed=1)
    corpus = Corpus("bench", tuple(texts[:200]))
    longest = max(map(len, tokenize_corpus(model, corpus)))
    rows = [new_sequence(model, t, request) for t in texts[:16]]
    read = max(len(r.prompt_ids) for r in rows)

    def generate() -> DecodingBatch:
        batch = DecodingBatch(model, [replace(r, output_ids=[], finish_reason=None) for r in rows])
        for _ in range(15):
            batch.step()
        return batch

    def collect() -> object:
        found = run_to_completion(collect_statistics(model, [layer], corpus))
        return found[layer].cholesky, found

    cache = memory_estimates.kv_cache_bytes(model, 16, read + 16)
    activation_bytes = (
        memory_estimates.forward_bytes(model, 16, read) + 40 * 16 * memory_estimates.ModelSizes.of(model).V
    )
    tasks: dict[str, tuple[Callable[[], object], int]] = {
        "edit, 20 contexts": (edit_task(model, short, contexts, [layer], 2), spec.peak_bytes(model)),
        f"trace, {length} tokens, {SAMPLES} samples": (
            trace_task(model, short, 10),
            memory_estimates.trace_bytes(model, length, 10),
        ),
        "statistics of a layer": (collect, memory_estimates.statistics_bytes(model, 1, longest)),
        f"generation, 16 rows to {read + 16} tokens": (generate, cache + activation_bytes),
    }
    table = []
    for what, (work, estimate) in tasks.items():
        peak = peak_bytes(work, report.device)
        table.append([what, peak / MIB, estimate / MIB, estimate / peak, f"{peak / weights:.1%}"])
    report.add_table(
        f"Memory at its peak, beyond {weights / MIB:.0f} MiB of weights ({name})",
        ("", "MiB", "estimated MiB", "estimate / peak", "of the weights"),
        table,
    )


def _trace_estimate(model: LoadedModel, prompt: str, samples: int) -> int:
    """Return the memory estimate of the tracer, which depends on the number of tracks of each token."""
    q = build_trace_input(model, fill_prompt(prompt, SUBJECT), None, samples, 0.1, 1, None, ())
    tracer = FastTracer(model, q, list_cells(q, TRACE_KINDS, 10, False, model.num_layers))
    counts = {token: sum(map(len, chunks)) for token, chunks in tracer.chunks_by_token.items()}
    return memory_estimates.trace_bytes(model, q.prompt_length, samples, counts)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = ["versions", "edits", "traces", "memory"]
    p.add_argument(
        "what", nargs="*", choices=[*choices, []], help="default: all"
    )  # [] is what no argument gives
    p.add_argument("--models", nargs="+", default=["shipped", "gpt2-small"], help="for versions and memory")
    p.add_argument("--model", default="shipped", help="for edits and traces")
    p.add_argument("--edits", type=int, nargs="+", default=[1, 10, 100, 500, 1000, 2000])
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    args.what = args.what or choices
    report = Report("scaling", args.device)
    texts = corpus_texts()
    if "versions" in args.what:
        for name in args.models:
            bench_versions(name, args.edits, texts, args.rounds, report)
        report.add_note(
            "A version of n edits costs 2 n^2 D for the products of keys and directions, 2/3 n^3 + 2 n^2 d to solve for their "
            "joint delta, and 2 n d D to add it to the weight. The edits need n (2 D + d) numbers, a version d D. Up to some "
            "hundred edits time grows linearly; towards n = D it grows with the square. One more edit repeats the solve but "
            "neither reading nor unpacking: a version is a function of its set of edits, which an updated solve would not be."
        )
    if "edits" in args.what:
        bench_edits(args.model, args.rounds, report)
        report.add_note(
            "An optimization step runs the layers above the edited one on the positions from the subject's last token, for each "
            "context: it is linear in each of the three. The text before the subject is run once."
        )
    if "traces" in args.what:
        bench_traces(args.model, args.rounds, report)
        report.add_note(
            "A trace has a cell for each token and layer, and each cell runs the layers above on the tokens that follow: cost is "
            "quadratic in the depth and in the length from the subject (less where cells share a run or a step does not fill "
            "the machine), and linear in the samples."
        )
    if "memory" in args.what:
        for name in args.models:
            bench_memory(name, texts, report)


if __name__ == "__main__":
    main()
