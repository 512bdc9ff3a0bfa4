"""How fast the service speaks to several callers at once, against transformers: tokens per second and time to first token.

    python bench/generation.py
    python bench/generation.py --draw greedy --callers 32 --rounds 3
    python bench/generation.py --model gpt2-xl --device cuda --dtype float16 --without-edits

The ways take turns within every round, on the same prompts:

- one by one: transformers' own `generate` on a plain model, one request after another. With several callers the others
  wait in a queue; the wait is reckoned from the measured starts and ends.
- continuous: transformers' continuous batching on a plain model, as many requests in flight as there are callers.
- ours: the embedded wiring (operations, broker, engine, streams); every caller listens to a stream and asks again when
  it has its answer.
- ours, editing: the same while one edit after another runs, at the newest version.

Every answer has the same number of tokens, as far as the model's positions go: end-of-text tokens are said like any other.
Every figure is also given as a multiple of one-by-one in the same round. Greedy texts are compared token by token.
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

from bench.harness import Report, Spread, in_turn, synchroniser
from bench.house import House
from bench.shapes import model_of
from service.datasets.records import Record, read_records
from service.kit.text import fill
from service.models.loading import LoadedModel
from service.schemas import GenerateRequest, Sampling
from service.settings import SHIPPED_MODEL

PAGE = 32  # tokens of a page of continuous batching's cache
SILENCE = 60.0  # seconds without an answer after which continuous batching counts as stuck
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
}


@dataclass
class Heard:
    """What the callers of one run heard."""

    seconds: float = 0.0
    firsts: list[float] = field(default_factory=list)  #: seconds from asking to the first token
    pauses: list[float] = field(default_factory=list)  #: seconds between two tokens of one stream
    said: dict[str, list[int]] = field(
        default_factory=dict
    )  #: the answer to each prompt, the last time it was given
    tokens: int = 0

    def answer(self, prompt: str, said: list[int], first: float) -> None:
        self.said[prompt] = said
        self.tokens += len(said)
        self.firsts.append(first)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class Way(Protocol):
    """One way of answering prompts for a number of callers."""

    def __call__(self, prompts: Sequence[str], asked: Sampling, callers: int) -> Heard: ...


def plain(model: LoadedModel) -> PreTrainedModel:
    """The same weights in transformers' own modules."""
    with torch.device(model.device):
        copy = AutoModelForCausalLM.from_config(model.model.config, dtype=model.embedding.weight.dtype)
    copy.load_state_dict(model.model.state_dict(), assign=True)
    copy.generation_config = GenerationConfig()
    return copy.eval()  # type: ignore[no-any-return]


def wanted(model: LoadedModel, asked: Sampling) -> GenerationConfig:
    """What is asked, in transformers' words."""
    drawn = {"do_sample": True, "temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p}
    return GenerationConfig(
        max_new_tokens=asked.max_new_tokens,
        pad_token_id=0,
        **(drawn if asked.temperature > 0 else {"do_sample": False}),
    )


@contextmanager
def endless(model: LoadedModel) -> Iterator[None]:
    """No token ends a text."""
    sources = (model.model.generation_config, model.model.config, model.tokenizer)
    ends = [source.eos_token_id for source in sources]
    for source in sources:
        source.eos_token_id = None
    try:
        yield
    finally:
        for source, end in zip(sources, ends, strict=True):
            source.eos_token_id = end


class First(BaseStreamer):  # type: ignore[misc]
    """Notes when the first token was there: what comes before it is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class OneByOne:
    """Transformers' `generate`."""

    def __init__(self, model: LoadedModel) -> None:
        self.model, self.plain = model, plain(model)

    def __call__(self, prompts: Sequence[str], asked: Sampling, callers: int) -> Heard:
        heard, config = Heard(), wanted(self.model, asked)
        began = time.perf_counter()
        ended = [began] * callers  # when each of the callers was answered last: the queue serves them in turn
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([self.model.encode(prompt)[0]], device=self.model.device)
            streamer = First()
            out = self.plain.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
            )
            said = out[0, ids.shape[1] :].tolist()
            heard.answer(prompt, said, streamer.times[1] - ended[number % callers])
            ended[number % callers] = time.perf_counter()
        heard.seconds = time.perf_counter() - began
        return heard


class Continuous:
    """Transformers' continuous batching. Prefixes are not shared: that serves stale keys after an edit (design, section 4)."""

    def __init__(self, model: LoadedModel) -> None:
        self.model, self.plain = model, plain(model)

    def __call__(self, prompts: Sequence[str], asked: Sampling, callers: int) -> Heard:
        ids = [self.model.encode(p)[0] for p in prompts]
        pages = -(-(max(map(len, ids)) + asked.max_new_tokens) // PAGE)
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=callers * pages + 8,
            max_batch_tokens=max(256, callers * 8, *map(len, ids)),
            max_requests_per_batch=callers,
            allow_block_sharing=False,
        )
        manager = self.plain.init_continuous_batching(
            generation_config=wanted(self.model, asked), continuous_batching_config=config
        )
        manager.start()
        try:
            return self._listen(manager, prompts, ids, callers)
        finally:
            manager.stop(block=True, timeout=10)

    def _listen(self, manager: Any, prompts: Sequence[str], ids: list[list[int]], callers: int) -> Heard:
        heard, waiting = Heard(), iter(range(len(prompts)))
        flying: dict[str, tuple[int, float]] = {}

        def ask(number: int) -> None:
            name = manager.add_request(ids[number], record_timestamps=True)
            if name is None:
                raise RuntimeError("continuous batching takes no more requests")
            flying[name] = number, time.perf_counter()

        began = time.perf_counter()
        for number in itertools.islice(waiting, callers):
            ask(number)
        while flying:
            result = manager.get_result(timeout=SILENCE)
            if result is None or result.error is not None:
                raise RuntimeError(f"continuous batching gave {(result and result.error) or 'no answer'}")
            if not result.is_finished():
                continue
            number, since = flying.pop(result.request_id)
            heard.answer(prompts[number], list(result.generated_tokens), result.timestamps[0] - since)
            for follower in itertools.islice(waiting, 1):
                ask(follower)
        heard.seconds = time.perf_counter() - began
        return heard


class Ours:
    """The service: as many streams as callers, all in one event loop, as the API has them."""

    def __init__(self, house: House, version: str) -> None:
        self.house, self.version = house, version

    def __call__(self, prompts: Sequence[str], asked: Sampling, callers: int) -> Heard:
        return asyncio.run(self._all(prompts, asked, callers))

    async def _all(self, prompts: Sequence[str], asked: Sampling, callers: int) -> Heard:
        heard, waiting = Heard(), iter(prompts)
        began = time.perf_counter()
        await asyncio.gather(*(self._caller(waiting, asked, heard) for _ in range(callers)))
        heard.seconds = time.perf_counter() - began
        return heard

    async def _caller(self, waiting: Iterator[str], asked: Sampling, heard: Heard) -> None:
        for prompt in waiting:
            request = GenerateRequest(
                prompt=prompt, stream=True, version=self.version, **asked.model_dump(exclude_unset=True)
            )
            since = time.perf_counter()
            channel = await asyncio.to_thread(self.house.wired.operations.calls.generate, request)
            times: list[float] = []
            async with aclosing(self.house.wired.broker.events(channel)) as events:  # type: ignore[type-var]
                async for event in events:
                    if event.name == "token":
                        times.append(time.perf_counter())
                    elif event.name == "end":
                        times = times or [time.perf_counter()]
                        heard.answer(prompt, event.data["choices"][0]["tokens"], times[0] - since)
                        heard.pauses += np.diff(times).tolist()
                    elif event.name == "error":
                        raise RuntimeError(event.data["detail"])


@contextmanager
def editing(house: House, cases: Sequence[Record]) -> Iterator[None]:
    """One edit after another in a thread, from before the body begins until after it has ended."""
    stop, running = threading.Event(), threading.Event()

    def edit() -> None:
        for case in itertools.cycle(cases):
            (waiting,) = house.submit([case])
            while (status := house.status(waiting)) in ("queued", "running"):
                if status == "running":
                    running.set()
                if stop.wait(0.02):
                    house.wired.operations.edits.revert(waiting, "bench")
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


class Race:
    """All ways for one way of drawing, in turn; what each heard in each round."""

    def __init__(self, ways: dict[str, Way], callers: Sequence[int], prompts: Sequence[str]) -> None:
        self.ways, self.callers, self.prompts = ways, callers, prompts
        self.heard: dict[tuple[str, int], list[Heard]] = {}
        self.failed: dict[str, str] = {}

    def run(
        self, asked: Sampling, rounds: int, around: Callable[[str], Any], synchronise: Callable[[], None]
    ) -> None:
        for way in list(self.ways):  # a few words first, so that nobody's first time is timed
            self._heard(way, asked, 1, self.prompts[:2], around)
        turns = [(way, n) for way in self.ways if way not in self.failed for n in self.callers]

        def turn(way: str, callers: int) -> None:
            # every caller has several turns; one by one needs each prompt once, whatever the callers
            count = len(self.prompts) if way == "one by one" else max(len(self.prompts), 3 * callers)
            prompts = list(itertools.islice(itertools.cycle(self.prompts), count))
            if (heard := self._heard(way, asked, callers, prompts, around)) is not None:
                self.heard.setdefault((way, callers), []).append(heard)

        in_turn(
            {f"{way} {n}": (lambda way=way, n=n: turn(way, n)) for way, n in turns}, rounds, 0, synchronise
        )

    def _heard(
        self,
        way: str,
        asked: Sampling,
        callers: int,
        prompts: Sequence[str],
        around: Callable[[str], Any],
    ) -> Heard | None:
        if way in self.failed:
            return None
        try:
            with around(way):
                return self.ways[way](prompts, asked, callers)
        except Exception as error:
            if way == "one by one":
                raise
            self.failed[way] = f"{type(error).__name__}: {error}"
            return None

    def rows(self) -> list[list[object]]:
        """For the table: speed and wait, each also as a multiple of one by one's."""
        rows: list[list[object]] = []
        for (way, callers), heard in sorted(
            self.heard.items(), key=lambda x: (x[0][1], list(self.ways).index(x[0][0]))
        ):
            base = self.heard["one by one", callers]
            if way in self.failed:
                continue
            speed, slow = (Spread(tuple(h.speed for h in x)) for x in (heard, base))
            first, late = (Spread(tuple(float(np.median(h.firsts)) for h in x)) for x in (heard, base))
            firsts = [1000 * x for h in heard for x in h.firsts]
            pauses = [1000 * x for h in heard for x in h.pauses]
            rows.append(
                [
                    way,
                    callers,
                    f"{speed.median:.0f}",
                    f"{speed.over(slow):.2f}",
                    f"{np.median(firsts):.1f}",
                    f"{np.quantile(firsts, 0.95):.1f}",
                    f"{first.over(late):.2f}",
                    f"{np.quantile(pauses, 0.95):.1f}" if pauses else "",
                    f"{max(pauses):.1f}" if pauses else "",
                ]
            )
        return rows

    def parity(self, way: str) -> str:
        """How many of the prompts have the same answer as one by one."""
        base = {
            p: s
            for (w, _), hs in self.heard.items()
            if w == "one by one"
            for h in hs
            for p, s in h.said.items()
        }
        found = [
            (p, s) for (w, _), hs in self.heard.items() if w == way for h in hs for p, s in h.said.items()
        ]
        return f"{way}: {sum(base[p] == s for p, s in found)} of {len(found)} answers are one by one's, token by token"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="shipped", help="a name of bench/shapes.py, or what `load` takes")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16", "float64"])
    p.add_argument("--threads", type=int)
    p.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32])
    p.add_argument("--draw", choices=DRAWS, nargs="+", default=list(DRAWS))
    p.add_argument("--prompts", type=int, default=12, help="different prompts")
    p.add_argument("--tokens", type=int, default=48, help="tokens of an answer")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--without-edits", action="store_true")
    p.add_argument("--without-continuous", action="store_true")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    model = model_of(args.model, args.device, getattr(torch, args.dtype))
    cases = read_records(SHIPPED_MODEL / "facts.jsonl", seed=1)
    prompts = list(dict.fromkeys(fill(c.prompt, c.subject).text for c in cases))[: args.prompts]
    report = Report("generation", args.device)
    with tempfile.TemporaryDirectory() as folder, House(Path(folder), model) as house:
        ways: dict[str, Way] = {"one by one": OneByOne(model)}
        if not args.without_continuous:
            ways["continuous"] = Continuous(model)
        ways["ours"] = Ours(house, "base")
        if not args.without_edits:
            house.edit(cases[:1])  # what an editor needs is made at the first
            ways["ours, editing"] = Ours(house, "head")
        for draw in args.draw:
            race = Race(ways, args.callers, prompts)
            asked = Sampling(max_new_tokens=args.tokens, **DRAWS[draw])
            with endless(model):
                race.run(
                    asked,
                    args.rounds,
                    lambda way: editing(house, cases[1:]) if way == "ours, editing" else nullcontext(),
                    synchroniser(args.device),
                )
            show(report, race, draw, args)


def show(report: Report, race: Race, draw: str, args: argparse.Namespace) -> None:
    title = f"{args.model}, {args.dtype}, {draw}, answers of {args.tokens} tokens"
    columns = ["way", "callers", "tokens/s", "x one by one", "first token ms", "p95", "x one by one"]
    report.table(title, [*columns, "pause p95 ms", "longest"], race.rows())
    for way, error in race.failed.items():
        report.note(f"{way} does not work here: {error}")
    if draw == "greedy":
        for way in race.ways:
            if way in ("continuous", "ours") and way not in race.failed:
                report.note(race.parity(way))


if __name__ == "__main__":
    main()
