"""Throughput and time to first token of the service with concurrent callers, compared with transformers.

    python bench/generation.py
    python bench/generation.py --draw greedy --callers 32 --rounds 3
    python bench/generation.py --model gpt2-xl --device cuda --dtype float16 --without-edits

The backends run in turn within every round, on the same prompts:

- one by one: `generate` of transformers, one request after another. With several callers the others wait in a
  queue; the wait is computed from the measured starts and ends.
- continuous: continuous batching of transformers, with as many requests in flight as there are callers.
- ours: the embedded wiring (services, broker, engine, streams). Every caller reads a stream and sends its
  next request when the stream ends.
- ours, editing: the same at the newest version, while edits run in sequence.

Every generation has the same number of tokens within the model's max positions; end-of-text tokens do not
stop it. Every measurement is also given as a multiple of "one by one" in the same round. Greedy texts are
compared token by token.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from bench.embedded_service import BenchService
from bench.harness import Report, Spread, device_synchronizer, time_interleaved
from bench.model_shapes import build_model
from service.datasets.loading import read_records
from service.datasets.record import Record
from service.kit.text import fill_prompt
from service.models.loading import LoadedModel
from service.schemas import GenerateRequest, Sampling
from service.settings import SHIPPED_MODEL

PAGE_TOKENS = 32  # page size of the cache of continuous batching
STALL_TIMEOUT = 60.0  # seconds without a result after which continuous batching has failed
SAMPLING_MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
}


@dataclass
class RunResult:
    """Timings and tokens of one run."""

    seconds: float = 0.0
    first_token_seconds: list[float] = field(
        default_factory=list
    )  #: seconds from the request to the first token
    inter_token_seconds: list[float] = field(
        default_factory=list
    )  #: seconds between two tokens of one stream
    token_ids: dict[str, list[int]] = field(default_factory=dict)  #: the last generation of each prompt
    tokens: int = 0

    def add_answer(self, prompt: str, token_ids: list[int], first_token_seconds: float) -> None:
        self.token_ids[prompt] = token_ids
        self.tokens += len(token_ids)
        self.first_token_seconds.append(first_token_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Backend(Protocol):
    """Generates continuations of prompts for a number of callers."""

    def __call__(self, prompts: Sequence[str], sampling: Sampling, callers: int) -> RunResult: ...


def stock_model(model: LoadedModel) -> PreTrainedModel:
    """Return a transformers model with the same weights."""
    with torch.device(model.device):
        copy = AutoModelForCausalLM.from_config(model.model.config, dtype=model.embedding.weight.dtype)
    copy.load_state_dict(model.model.state_dict(), assign=True)
    copy.generation_config = GenerationConfig()
    return copy.eval()


def to_generation_config(model: LoadedModel, sampling: Sampling) -> GenerationConfig:
    """Return sampling parameters as a GenerationConfig."""
    sampling_options = {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=0,
        **(sampling_options if sampling.temperature > 0 else {"do_sample": False}),
    )


@contextmanager
def without_end_tokens(model: LoadedModel) -> Iterator[None]:
    """Remove the end-of-text token, so that no token stops a generation."""
    sources = (model.model.generation_config, model.model.config, model.tokenizer)
    end_token_ids = [source.eos_token_id for source in sources]
    for source in sources:
        source.eos_token_id = None
    try:
        yield
    finally:
        for source, end in zip(sources, end_token_ids, strict=True):
            source.eos_token_id = end


class TokenTimer(BaseStreamer):  # type: ignore[misc]
    """Records the time of each token; the first call has the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class SequentialBackend:
    """The `generate` method of transformers, one request after another."""

    def __init__(self, model: LoadedModel) -> None:
        self.model, self.stock_model = model, stock_model(model)

    def __call__(self, prompts: Sequence[str], sampling: Sampling, callers: int) -> RunResult:
        result, config = RunResult(), to_generation_config(self.model, sampling)
        began = time.perf_counter()
        ended = [began] * callers  # end of the last generation of each caller; the queue serves them in turn
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([self.model.encode(prompt)[0]], device=self.model.device)
            streamer = TokenTimer()
            out = self.stock_model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
            )
            token_ids = out[0, ids.shape[1] :].tolist()
            result.add_answer(prompt, token_ids, streamer.times[1] - ended[number % callers])
            ended[number % callers] = time.perf_counter()
        result.seconds = time.perf_counter() - began
        return result


class ContinuousBatchingBackend:
    """Continuous batching of transformers. Prefix sharing is disabled, because cached keys would be stale
    after an edit."""

    def __init__(self, model: LoadedModel) -> None:
        self.model, self.stock_model = model, stock_model(model)

    def __call__(self, prompts: Sequence[str], sampling: Sampling, callers: int) -> RunResult:
        ids = [self.model.encode(p)[0] for p in prompts]
        pages = -(-(max(map(len, ids)) + sampling.max_new_tokens) // PAGE_TOKENS)
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=callers * pages + 8,
            max_batch_tokens=max(256, callers * 8, *map(len, ids)),
            max_requests_per_batch=callers,
            allow_block_sharing=False,
        )
        manager = self.stock_model.init_continuous_batching(
            generation_config=to_generation_config(self.model, sampling), continuous_batching_config=config
        )
        manager.start()
        try:
            return self._collect(manager, prompts, ids, callers)
        finally:
            manager.stop(block=True, timeout=10)

    def _collect(self, manager: Any, prompts: Sequence[str], ids: list[list[int]], callers: int) -> RunResult:
        run_result, waiting = RunResult(), iter(range(len(prompts)))
        in_flight: dict[str, tuple[int, float]] = {}

        def ask(number: int) -> None:
            name = manager.add_request(ids[number], record_timestamps=True)
            if name is None:
                raise RuntimeError("continuous batching rejected a request")
            in_flight[name] = number, time.perf_counter()

        began = time.perf_counter()
        for number in itertools.islice(waiting, callers):
            ask(number)
        while in_flight:
            result = manager.get_result(timeout=STALL_TIMEOUT)
            if result is None or result.error is not None:
                raise RuntimeError(f"continuous batching gave {(result and result.error) or 'no result'}")
            if not result.is_finished():
                continue
            number, since = in_flight.pop(result.request_id)
            run_result.add_answer(
                prompts[number], list(result.generated_tokens), result.timestamps[0] - since
            )
            for next_number in itertools.islice(waiting, 1):
                ask(next_number)
        run_result.seconds = time.perf_counter() - began
        return run_result


class ServiceBackend:
    """The service: one stream per caller, all in one event loop, as in the API."""

    def __init__(self, bench_service: BenchService, version: str) -> None:
        self.bench_service, self.version = bench_service, version

    def __call__(self, prompts: Sequence[str], sampling: Sampling, callers: int) -> RunResult:
        return asyncio.run(self._run_callers(prompts, sampling, callers))

    async def _run_callers(self, prompts: Sequence[str], sampling: Sampling, callers: int) -> RunResult:
        result, waiting = RunResult(), iter(prompts)
        began = time.perf_counter()
        await asyncio.gather(*(self._run_caller(waiting, sampling, result) for _ in range(callers)))
        result.seconds = time.perf_counter() - began
        return result

    async def _run_caller(self, waiting: Iterator[str], sampling: Sampling, result: RunResult) -> None:
        for prompt in waiting:
            request = GenerateRequest(
                prompt=prompt, stream=True, version=self.version, **sampling.model_dump(exclude_unset=True)
            )
            since = time.perf_counter()
            channel = await asyncio.to_thread(
                self.bench_service.container.services.generation.generate, request
            )
            times: list[float] = []
            async with aclosing(self.bench_service.container.broker.events(channel)) as events:  # type: ignore[type-var]
                async for event in events:
                    if event.name == "token":
                        times.append(time.perf_counter())
                    elif event.name == "end":
                        times = times or [time.perf_counter()]
                        result.add_answer(prompt, event.data["choices"][0]["tokens"], times[0] - since)
                        result.inter_token_seconds += np.diff(times).tolist()
                    elif event.name == "error":
                        raise RuntimeError(event.data["detail"])


@contextmanager
def continuous_editing(bench_service: BenchService, cases: Sequence[Record]) -> Iterator[None]:
    """Run edits in sequence in a thread while the body runs."""
    stop, running = threading.Event(), threading.Event()

    def edit() -> None:
        for case in itertools.cycle(cases):
            (waiting,) = bench_service.submit([case])
            while (status := bench_service.status(waiting)) in ("queued", "running"):
                if status == "running":
                    running.set()
                if stop.wait(0.02):
                    bench_service.container.services.edits.revert(waiting, "bench")
            if stop.is_set():
                return

    thread = threading.Thread(target=edit)
    thread.start()
    running.wait(30)
    try:
        yield
    finally:
        stop.set()
        thread.join()


class BackendComparison:
    """Runs of all backends in one sampling mode, with the results of each round."""

    def __init__(self, backends: dict[str, Backend], callers: Sequence[int], prompts: Sequence[str]) -> None:
        self.backends, self.callers, self.prompts = backends, callers, prompts
        self.results: dict[tuple[str, int], list[RunResult]] = {}
        self.errors: dict[str, str] = {}

    def run(
        self,
        sampling: Sampling,
        rounds: int,
        context_for: Callable[[str], Any],
        synchronise: Callable[[], None],
    ) -> None:
        for way in list(self.backends):  # warm-up
            self._run_backend(way, sampling, 1, self.prompts[:2], context_for)
        turns = [(way, n) for way in self.backends if way not in self.errors for n in self.callers]

        def turn(way: str, callers: int) -> None:
            # every caller has several requests; "one by one" runs each prompt once
            count = len(self.prompts) if way == "one by one" else max(len(self.prompts), 3 * callers)
            prompts = list(itertools.islice(itertools.cycle(self.prompts), count))
            if (heard := self._run_backend(way, sampling, callers, prompts, context_for)) is not None:
                self.results.setdefault((way, callers), []).append(heard)

        time_interleaved({f"{way} {n}": partial(turn, way, n) for way, n in turns}, rounds, 0, synchronise)

    def _run_backend(
        self,
        name: str,
        sampling: Sampling,
        callers: int,
        prompts: Sequence[str],
        context_for: Callable[[str], Any],
    ) -> RunResult | None:
        if name in self.errors:
            return None
        try:
            with context_for(name):
                return self.backends[name](prompts, sampling, callers)
        except Exception as error:
            if name == "one by one":
                raise
            self.errors[name] = f"{type(error).__name__}: {error}"
            return None

    def table_rows(self) -> list[list[object]]:
        """Return the rows of the table: throughput and latency, also as multiples of "one by one"."""
        rows: list[list[object]] = []
        for (name, callers), results in sorted(
            self.results.items(), key=lambda x: (x[0][1], list(self.backends).index(x[0][0]))
        ):
            baseline = self.results["one by one", callers]
            if name in self.errors:
                continue
            speed, baseline_speed = (
                Spread(tuple(h.tokens_per_second for h in x)) for x in (results, baseline)
            )
            first, baseline_first = (
                Spread(tuple(float(np.median(h.first_token_seconds)) for h in x)) for x in (results, baseline)
            )
            firsts = [1000 * x for h in results for x in h.first_token_seconds]
            pauses = [1000 * x for h in results for x in h.inter_token_seconds]
            rows.append(
                [
                    name,
                    callers,
                    f"{speed.median:.0f}",
                    f"{speed.ratio_to(baseline_speed):.2f}",
                    f"{np.median(firsts):.1f}",
                    f"{np.quantile(firsts, 0.95):.1f}",
                    f"{first.ratio_to(baseline_first):.2f}",
                    f"{np.quantile(pauses, 0.95):.1f}" if pauses else "",
                    f"{max(pauses):.1f}" if pauses else "",
                ]
            )
        return rows

    def token_parity(self, name: str) -> str:
        """Return how many generations equal those of "one by one", as a sentence."""
        base = {
            p: s
            for (w, _), hs in self.results.items()
            if w == "one by one"
            for h in hs
            for p, s in h.token_ids.items()
        }
        answers = [
            (p, s)
            for (w, _), hs in self.results.items()
            if w == name
            for h in hs
            for p, s in h.token_ids.items()
        ]
        return f"{name}: {sum(base[p] == s for p, s in answers)} of {len(answers)} generations equal those of one by one, token by token"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model", default="shipped", help="a name of bench/model_shapes.py, a folder, or a name on the hub"
    )
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16", "float64"])
    p.add_argument("--threads", type=int)
    p.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32])
    p.add_argument("--draw", choices=SAMPLING_MODES, nargs="+", default=list(SAMPLING_MODES))
    p.add_argument("--prompts", type=int, default=12, help="number of prompts")
    p.add_argument("--tokens", type=int, default=48, help="tokens of a generation")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--without-edits", action="store_true")
    p.add_argument("--without-continuous", action="store_true")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    model = build_model(args.model, args.device, getattr(torch, args.dtype))
    cases = read_records(SHIPPED_MODEL / "facts.jsonl", seed=1)
    prompts = list(dict.fromkeys(fill_prompt(c.prompt, c.subject).text for c in cases))[: args.prompts]
    report = Report("generation", args.device)
    with tempfile.TemporaryDirectory() as folder, BenchService(Path(folder), model) as bench_service:
        backends: dict[str, Backend] = {"one by one": SequentialBackend(model)}
        if not args.without_continuous:
            backends["continuous"] = ContinuousBatchingBackend(model)
        backends["ours"] = ServiceBackend(bench_service, "base")
        if not args.without_edits:
            bench_service.edit(cases[:1])  # the first edit prepares the editor context
            backends["ours, editing"] = ServiceBackend(bench_service, "head")
        for mode in args.draw:
            comparison = BackendComparison(backends, args.callers, prompts)
            sampling = Sampling(max_new_tokens=args.tokens, **SAMPLING_MODES[mode])
            with without_end_tokens(model):
                comparison.run(
                    sampling,
                    args.rounds,
                    lambda way: (
                        continuous_editing(bench_service, cases[1:])
                        if way == "ours, editing"
                        else nullcontext()
                    ),
                    device_synchronizer(args.device),
                )
            report_results(report, comparison, mode, args)


def report_results(
    report: Report, comparison: BackendComparison, mode: str, args: argparse.Namespace
) -> None:
    title = f"{args.model}, {args.dtype}, {mode}, {args.tokens} tokens"
    columns = ["backend", "callers", "tokens/s", "x one by one", "first token ms", "p95", "x one by one"]
    report.add_table(title, [*columns, "pause p95 ms", "longest"], comparison.table_rows())
    for name, error in comparison.errors.items():
        report.add_note(f"{name} failed: {error}")
    if mode == "greedy":
        for name in comparison.backends:
            if name in ("continuous", "ours") and name not in comparison.errors:
                report.add_note(comparison.token_parity(name))


if __name__ == "__main__":
    main()
