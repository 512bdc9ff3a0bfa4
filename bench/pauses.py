"""Pauses of a streaming generation while edits run, on the shipped GPT.

    python bench/pauses.py --edits 8

Prints the durations of the steps of an edit by phase and of the pauses between two tokens of a stream, with and without
edits; then whether the longest pause is within one optimization step plus one decode step.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.embedded_service import BenchService, Durations
from bench.harness import Report
from service.datasets.loading import read_records
from service.engine.engine import EngineConfig
from service.models.loading import load_model
from service.schemas import GenerateRequest
from service.settings import SHIPPED_MODEL


async def measure_stream_pauses(bench_service: BenchService, stop: threading.Event) -> list[float]:
    """Run one stream after another until `stop` is set. Return the seconds between two tokens of a stream."""
    pauses: list[float] = []
    request = GenerateRequest(
        prompt="The Eiffel Tower", max_new_tokens=80, stream=True, version="base", temperature=0.8
    )
    while not stop.is_set():
        last = None
        channel = bench_service.container.services.generation.generate(request)
        async for event in bench_service.container.broker.events(channel):
            now = time.perf_counter()
            if event.name == "token":
                if last is not None:
                    pauses.append(now - last)
                last = now
    return pauses


def measure_pauses_during(bench_service: BenchService, work: Callable[[], object]) -> list[float]:
    """Return the pauses of streams in another thread while `work()` runs."""
    stop = threading.Event()
    pauses: list[float] = []
    listener = threading.Thread(
        target=lambda: pauses.extend(asyncio.run(measure_stream_pauses(bench_service, stop)))
    )
    listener.start()
    work()
    stop.set()
    listener.join()
    return pauses


def report_durations(report: Report, title: str, durations: Durations) -> None:
    rows = []
    for name, values in durations.items():
        ms = 1000 * np.asarray(values)
        figures = (np.median(ms), np.quantile(ms, 0.95), np.quantile(ms, 0.99), ms.max())
        rows.append((name, len(ms), *(f"{x:.1f}" for x in figures)))
    report.add_table(title, ("", "count", "median ms", "p95 ms", "p99 ms", "longest ms"), rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument("--edits", type=int, default=8)
    p.add_argument("--batch-size", type=int, default=16, help="max edits per batch")
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    report = Report("pauses", args.device)
    cases = read_records(Path(args.model) / "facts.jsonl", seed=1)[: args.edits + 1]
    config = EngineConfig(max_edits_per_group=args.batch_size)
    model = load_model(args.model, args.device)
    with tempfile.TemporaryDirectory() as folder, BenchService(Path(folder), model, config) as bench_service:
        bench_service.edit(cases[:1])  # warm
        bench_service.durations.clear()
        idle_pauses = measure_pauses_during(bench_service, lambda: time.sleep(5))
        busy_pauses = measure_pauses_during(bench_service, lambda: bench_service.edit(cases[1:]))
    report_durations(report, "Steps of an edit, by phase", bench_service.durations)
    report_durations(
        report,
        "Pauses between two tokens of a stream",
        {"no edit running": idle_pauses, "edits running": busy_pauses},
    )
    limit = max(bench_service.durations["optimize"]) + max(idle_pauses)
    verdict = "within" if max(busy_pauses) <= limit else "ABOVE"
    report.add_note(
        f"The longest pause is {1000 * max(busy_pauses):.0f} ms: {verdict} one optimization step plus one decode step "
        f"({1000 * limit:.0f} ms)."
    )


if __name__ == "__main__":
    main()
