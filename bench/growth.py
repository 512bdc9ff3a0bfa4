"""How cost grows: of a version with its edits, of an edit and a trace with their size, and the memory of each method.

    python bench/growth.py
    python bench/growth.py versions --models shipped gpt2-small --edits 1 10 100 500 1000 2000
    python bench/growth.py edits traces
    python bench/growth.py memory --models gpt2-xl --device cuda

Keys are real: those of the model's corpus at the edited layer, one of each text. Values are random, which costs the same.
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

from bench.harness import Report, Spread, in_turn, synchroniser
from bench.peak import peak_bytes
from bench.shapes import DEPTH, model_of
from service.covariance.collect import collect_steps, rows_of
from service.covariance.corpus import Corpus, corpus_steps
from service.covariance.second_moment import Statistics
from service.editing.edit_spec import want
from service.editing.methods.registry import find_together_steps
from service.engine.decoding import Batch, row
from service.engine.versioned_model import Replica
from service.kit.steps import finish
from service.kit.text import fill
from service.models import memory_estimates
from service.models.hooks import capture, stop_after
from service.models.loading import LoadedModel, wrap
from service.models.token_batch import forward, pad
from service.recipes.recipe import RomeParameters
from service.schemas import GenerateRequest
from service.tracing.fast_trace import Tracer, trace_steps
from service.tracing.interventions import cells_of
from service.tracing.reference import KINDS
from service.tracing.trace_input import ask
from service.weights.composition import Association, compose_layer, pack, rebuild

CONTEXTS = [
    "The first thing to know",
    "In the afternoon they said",
    "It is well known",
    "A letter from the north",
]
SUBJECT = "Marie Curie"
FILLER = "and then there was a long way to go before "
SAMPLES = 5  # of the trace whose memory is weighed
MIB = 2**20


def text_of() -> tuple[str, ...]:
    """The shipped model's statements: every model here speaks its tokens."""
    return finish(corpus_steps(model_of("shipped"), 60_000, None)).texts


class Book:
    """A ledger in memory: version n has the first n edits."""

    def __init__(self, packed: Sequence[bytes]) -> None:
        self.packed = packed

    def head(self) -> int:
        return len(self.packed)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        return [(f"{i:05}", {"subject": f"subject {i}"}) for i in range(version)]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {e: self.packed[int(e)] for e in edits}

    def attest(self, version: int, digest: str) -> None:
        """Nobody asks."""


def associations(model: LoadedModel, layer: int, texts: Sequence[str], count: int) -> list[Association]:
    """Real keys, each of the last token of a text; directions of the moment of that text; random values."""
    step = max(1, len(texts) // count)
    chosen = [model.encode(t)[0] for t in texts[::step][:count]]
    keys = []
    for at in range(0, len(chosen), 64):
        batch = pad(chosen[at : at + 64], model)
        with capture({0: model.down(layer)}, "input") as seen, stop_after(model.down(layer)):
            forward(model, batch)
        rows = seen[0].reshape(*batch.ids.shape, -1)
        keys += [rows[i, n - 1].float().cpu() for i, n in enumerate(batch.lengths)]
    statistics = finish(collect_steps(model, [layer], Corpus("bench", tuple(texts[:400]))))[layer]
    directions = statistics.solve(torch.stack(keys, 1)).float().T
    generator = torch.Generator().manual_seed(0)
    return [
        Association(
            f"{i:05}", f"subject {i}", layer, k, u.contiguous(), torch.randn(model.width, generator=generator)
        )
        for i, (k, u) in enumerate(zip(keys, directions, strict=True))
    ]


def versions(name: str, counts: Sequence[int], texts: Sequence[str], rounds: int, report: Report) -> None:
    """Reaching a version from nothing, and from the one before it."""
    model = model_of(name, report.device)
    layer = DEPTH.get(name, 0)
    every = associations(model, layer, texts, max(counts))
    if len(every) < max(counts):
        report.note(f"{name}: the corpus has {len(every)} texts; larger versions are left out.")
    packed = [pack([a]) for a in every]
    base, conv1d = model.weight(layer).data, model.architecture.conv1d
    wait, times, sizes = synchroniser(report.device), [], []
    for n in [n for n in counts if n <= len(every)]:
        laps: dict[str, list[float]] = {}
        for _ in range(rounds):
            replica = Replica(model, Book(packed[:n]))
            first = _timed(partial(replica.active, n), wait)
            change = _timed(partial(compose_layer, every[:n]), wait)
            weight = _timed(partial(rebuild, base, change[0], conv1d), wait)
            whole = _timed(partial(Replica(model, Book(packed[:n])).digest, n), wait)
            one_more = Replica(model, Book(packed[:n]))
            one_more.active(n - 1)
            added = _timed(partial(one_more.digest, n), wait)
            for what, (_, seconds) in {
                "unpack": first,
                "compose": change,
                "rebuild": weight,
                "from nothing": whole,
                "one more": added,
            }.items():
                laps.setdefault(what, []).append(seconds)
        times.append([str(n), *(Spread(tuple(v)) for v in laps.values()), operations(model, n) / 1e9])
        held = peak_bytes(partial(_version, base, every[:n], conv1d), report.device)
        sizes.append(
            [
                str(n),
                sum(map(len, packed[:n])) / MIB,
                4 * n * (2 * model.inner_width + model.width) / MIB,
                held / MIB,
                memory_estimates.compose_bytes(model, n) / MIB,
                memory_estimates.version_bytes(model, 1) / MIB,
            ]
        )
    shape = f"{name}, D = {model.inner_width}, d = {model.width}"
    report.table(
        f"Versions by their edits ({shape}): seconds",
        ("edits", "unpack", "compose", "rebuild", "from nothing", "one more edit", "GFLOP"),
        times,
    )
    report.table(
        f"Versions by their edits ({shape}): MiB",
        ("edits", "in the ledger", "associations", "peak of composing", "estimate", "a kept version"),
        sizes,
    )


def operations(model: LoadedModel, n: int) -> int:
    """Floating-point operations in fp64 of composing n edits of one layer and of adding their change to the weight."""
    d, D = model.width, model.inner_width
    return 2 * n * n * D + 2 * n**3 // 3 + 2 * n * n * d + 2 * n * d * D


def _version(base: torch.Tensor, some: Sequence[Association], conv1d: bool) -> torch.Tensor:
    return rebuild(base, compose_layer(some), conv1d)


def _timed(work: Callable[[], Any], wait: Callable[[], None]) -> tuple[Any, float]:
    wait()
    began = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - began


def prompt_of(model: LoadedModel, tokens: int, early: bool = False) -> str:
    """A prompt of at least so many tokens, its subject close to the end or at the beginning."""
    lead, text = ("{} ", "was born in the city of") if early else ("", "{} was born in the city of")
    while length_of(model, lead + text) < tokens:
        text = FILLER + text
    return lead + text


def length_of(model: LoadedModel, prompt: str) -> int:
    return len(model.encode(fill(prompt, SUBJECT).text)[0])


def deeper(model: LoadedModel, layers: int) -> LoadedModel:
    """A random model of the same shape with another number of layers."""
    config = copy.deepcopy(model.model.config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device(model.device):
        made = AutoModelForCausalLM.from_config(config, dtype=model.weight(0).dtype)
    return wrap(made, model.tokenizer, f"{model.name}, {layers} layers")


def unit(model: LoadedModel, layers: Sequence[int]) -> dict[int, Statistics]:
    """C = I: what C is does not change what an edit costs."""
    eye = torch.eye(model.inner_width, dtype=torch.float64)
    return {x: Statistics(x, eye, 1, 0.0, "unit") for x in layers}


def edit(
    model: LoadedModel, prompt: str, contexts: Sequence[str], layers: Sequence[int], steps: int = 25
) -> Callable[[], object]:
    """One edit with a fixed number of steps."""
    parameters = RomeParameters(layers=list(layers), steps=steps, stop_loss=0.0, bare_keys=True)
    statistics = unit(model, layers)
    for s in statistics.values():
        s.solve(torch.ones(model.inner_width))
    statement = fill(prompt, SUBJECT)

    def work() -> object:
        wanted = want(model, contexts, statement, "Rome", parameters)
        return finish(find_together_steps(model, statistics, [wanted]))

    return work


def trace(model: LoadedModel, prompt: str, samples: int) -> Callable[[], object]:
    """One trace of all three kinds."""
    return lambda: finish(trace_steps(model, fill(prompt, SUBJECT), samples=samples, noise=0.1))


def growing(title: str, ways: dict[str, Callable[[], object]], rounds: int, report: Report) -> None:
    """Seconds of each way, and how much more that is than the first."""
    seconds = in_turn(ways, rounds, warm=0, synchronise=synchroniser(report.device))
    first = next(iter(seconds.values()))
    report.table(
        title, ("", "seconds", "over the first"), [[n, s, s.over(first)] for n, s in seconds.items()]
    )


def edits(name: str, rounds: int, report: Report) -> None:
    """An edit's cost against the length of its prompt, its contexts, its layers, and the model's depth."""
    model = model_of(name, report.device)
    layer, short = DEPTH.get(name, 0), "{} was born in the city of"
    longest = min(model.positions - 20, 96)
    ends = {length_of(model, p): p for n in (8, 24, 48, longest) if (p := prompt_of(model, n))}
    before = {f"{n} tokens": edit(model, p, CONTEXTS, [layer]) for n, p in ends.items()}
    growing(f"An edit by its prompt's length, the subject close to the end ({name})", before, rounds, report)
    begins = {length_of(model, p): p for n in (8, 24, 48) if (p := prompt_of(model, n, early=True))}
    after = {f"{n} tokens": edit(model, p, CONTEXTS, [layer]) for n, p in begins.items()}
    growing(f"An edit by its prompt's length, the subject at the beginning ({name})", after, rounds, report)
    leads = {f"{n} contexts": edit(model, short, (CONTEXTS * 5)[:n], [layer]) for n in (0, 5, 10, 20)}
    growing(f"An edit by its contexts ({name})", leads, rounds, report)
    several = {f"{n} layers": edit(model, short, CONTEXTS, range(layer, layer + n)) for n in (1, 2, 3)}
    growing(f"An edit by the layers that it writes ({name})", several, rounds, report)
    depths = {f"{n} layers": edit(deeper(model, n), short, CONTEXTS, [0]) for n in (4, 8, 16)}
    growing(f"An edit of layer 0 by the model's depth ({name}'s shape)", depths, rounds, report)


def traces(name: str, rounds: int, report: Report) -> None:
    """A trace's cost against length, depth and samples."""
    model = model_of(name, report.device)
    short = "{} was born in the city of"
    begins = {length_of(model, p): p for n in (8, 20, 32) if (p := prompt_of(model, n, early=True))}
    lengths = {f"{n} tokens": trace(model, p, 3) for n, p in begins.items()}
    growing(
        f"A trace by its length, the subject at the beginning (3 samples; {name})", lengths, rounds, report
    )
    samples = {f"{n} samples": trace(model, short, n) for n in (1, 5, 10)}
    growing(f"A trace by its samples ({name})", samples, rounds, report)
    depths = {f"{n} layers": trace(deeper(model, n), short, 3) for n in (4, 8, 16)}
    growing(f"A trace by the model's depth (3 samples; {name}'s shape)", depths, rounds, report)


def peaks(name: str, texts: Sequence[str], report: Report) -> None:
    """The most memory of each method beyond the weights, beside the estimate that admission goes by."""
    model = model_of(name, report.device)
    layer, short = DEPTH.get(name, 0), "{} was born in the city of"
    contexts = (CONTEXTS * 5)[:20]
    weights = sum(p.numel() * p.element_size() for p in model.model.parameters())
    wanted = want(
        model, contexts, fill(short, SUBJECT), "Rome", RomeParameters(layers=[layer], bare_keys=True)
    )
    length = length_of(model, short)
    asked = GenerateRequest(prompts=list(texts[:16]), max_new_tokens=16, temperature=0.7, seed=1)
    corpus = Corpus("bench", tuple(texts[:200]))
    longest = max(map(len, rows_of(model, corpus)))
    rows = [row(model, t, asked) for t in texts[:16]]
    read = max(len(r.prompt) for r in rows)

    def generate() -> Batch:
        batch = Batch(model, [replace(r, said=[], finish_reason=None) for r in rows])
        for _ in range(15):
            batch.step()
        return batch

    def collect() -> object:
        found = finish(collect_steps(model, [layer], corpus))
        return found[layer].cholesky, found

    cache = memory_estimates.cache_bytes(model, 16, read + 16)
    voice = memory_estimates.pass_bytes(model, 16, read) + 40 * 16 * memory_estimates.Sizes.of(model).V
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "edit, 20 contexts": (edit(model, short, contexts, [layer], 2), wanted.bytes(model)),
        f"trace, {length} tokens, {SAMPLES} samples": (
            trace(model, short, 10),
            memory_estimates.trace_bytes(model, length, 10),
        ),
        "statistics of a layer": (collect, memory_estimates.statistics_bytes(model, 1, longest)),
        f"generation, 16 rows to {read + 16} tokens": (generate, cache + voice),
    }
    table = []
    for what, (work, estimate) in ways.items():
        held = peak_bytes(work, report.device)
        table.append([what, held / MIB, estimate / MIB, estimate / held, f"{held / weights:.1%}"])
    report.table(
        f"Memory at its peak, beyond {weights / MIB:.0f} MiB of weights ({name})",
        ("", "MiB", "estimated MiB", "estimate / peak", "of the weights"),
        table,
    )


def _trace_estimate(model: LoadedModel, prompt: str, samples: int) -> int:
    """As the tracer makes it, which knows how many tracks each token has."""
    q = ask(model, fill(prompt, SUBJECT), None, samples, 0.1, 1, None, ())
    tracer = Tracer(model, q, cells_of(q, KINDS, 10, False, model.layers))
    counts = {token: sum(map(len, chunks)) for token, chunks in tracer.plan.items()}
    return memory_estimates.trace_bytes(model, q.length, samples, counts)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["versions", "edits", "traces", "memory"]
    p.add_argument("what", nargs="*", choices=[*parts, []], default=parts)
    p.add_argument("--models", nargs="+", default=["shipped", "gpt2-small"], help="for versions and memory")
    p.add_argument("--model", default="shipped", help="for edits and traces")
    p.add_argument("--edits", type=int, nargs="+", default=[1, 10, 100, 500, 1000, 2000])
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    report = Report("growth", args.device)
    texts = text_of()
    if "versions" in args.what:
        for name in args.models:
            versions(name, args.edits, texts, args.rounds, report)
        report.note(
            "A version of n edits costs 2 n^2 D for all products of keys and directions, 2/3 n^3 + 2 n^2 d to solve for their "
            "common change, and 2 n d D to add it to the weight; what is kept of n edits is n (2 D + d) numbers, and of a "
            "version its d D. So up to some hundred edits time grows in line with them and is little; towards n = D it "
            "grows with the square. One edit more costs the whole solution again, but neither reading nor unpacking: a "
            "version is a function of its set of edits alone, which a solution that is carried on would not be."
        )
    if "edits" in args.what:
        edits(args.model, args.rounds, report)
        report.note(
            "A step of the search runs the layers above the edited one on the positions from the subject's last token on, for "
            "each context: it grows with these three in line. What stands before the subject is read once."
        )
    if "traces" in args.what:
        traces(args.model, args.rounds, report)
        report.note(
            "A trace has a cell for each token and layer, each of which runs the layers above on the tokens that follow: it grows "
            "with the square of the depth and of the length from the subject on (less where cells share a run, and where a step "
            "is too small to fill the machine), and in line with the samples."
        )
    if "memory" in args.what:
        for name in args.models:
            peaks(name, texts, report)


if __name__ == "__main__":
    main()
