"""The pauses of a streaming generation while edits are applied, on the shipped GPT.

    python bench/pauses.py --edits 8
    python bench/pauses.py --edits 2 --batch-size 1 --active 1000

`--active N` starts with N active edits in the ledger: random values at real keys, at the layer that the
recipe edits. The output has the durations of one decode step alone, of the steps of an edit by phase, of the
steps of building a version, and of the pauses between two tokens of a stream while edits are applied. It then
states whether the longest pause is within one optimization step plus one decode step.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.embedded_service import BenchService, Durations
from bench.harness import Report
from service.datasets.loading import read_records
from service.datasets.record import Record
from service.db.models import Job, LedgerEntry, StoredFactors, now
from service.engine.engine import EngineConfig
from service.kit.ids import new_id
from service.kit.text import fact_key
from service.ledger import ledger
from service.models.loading import LoadedModel, load_model
from service.schemas import GenerateRequest
from service.settings import SHIPPED_MODEL
from service.weights.factors import serialize_updates

SHIPPED_LAYER = 0  # that the shipped recipe edits


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


def seed_ledger(bench_service: BenchService, model: LoadedModel, count: int) -> None:
    """Add edits to the ledger of a service, each an association at the key of a text, all of them active."""
    from bench.scaling import corpus_texts, make_associations  # imports the corpus reader

    associations = make_associations(model, SHIPPED_LAYER, corpus_texts(), count)
    if len(associations) < count:
        raise SystemExit(f"the corpus has only {len(associations)} texts")
    entries: list[ledger.Entry] = []
    with bench_service.container.database.write_session() as session:
        for number, association in enumerate(associations):
            updates = [association.scaled(0.01)]
            factors = serialize_updates(updates)
            digest = hashlib.sha256(factors).hexdigest()
            fact = {
                "subject": association.subject,
                "prompt": "{} is in",
                "target_new": "Rome",
                "target_true": "Paris",
            }
            job = Job(
                id=new_id("edit"),
                kind="edit",
                model=model.fingerprint,
                status="applied",
                request=fact,
                actor="bench",
                created=now(),
                updated=now(),
                subject=association.subject,
                fact_key=fact_key(association.subject, fact["prompt"]),
                version=number + 1,
            )
            session.add(job)
            session.flush()
            session.add(StoredFactors(edit_id=job.id, data=factors, sha256=digest))
            previous = entries[-1].hash if entries else ledger.GENESIS_HASH
            body = {**fact, "factors_sha256": digest, "strength": 1.0, "resolved_true": "Paris"}
            entry = ledger.Entry(
                model.fingerprint, number + 1, ledger.APPLY, job.id, "bench", now(), body, "", previous, ""
            )
            entry = replace(entry, state=ledger.state_hash(model.fingerprint, [*entries, entry]))
            entry = replace(entry, hash=ledger.chain_hash(previous, entry))
            entries.append(entry)
            session.add(LedgerEntry(**{name: getattr(entry, name) for name in ledger.ENTRY_FIELDS}))
    while bench_service.engine.served_version is None or bench_service.engine.served_version[0] < count:
        time.sleep(0.1)
    time.sleep(1.0)  # the capacity of the version is measured after it is served


def edit_and_follow(bench_service: BenchService, cases: Sequence[Record]) -> None:
    """Apply edits, and wait until the engine serves the last version and has measured its capacity."""
    bench_service.edit(cases)
    head = bench_service.replica.ledger.head()
    while (bench_service.engine.served_version or (0, ""))[0] < head:
        time.sleep(0.05)
    time.sleep(2.0)


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
    p.add_argument("--active", type=int, default=0, help="active edits to begin with")
    p.add_argument("--batch-size", type=int, default=16, help="most waiting edits that run as one group")
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
        if args.active:
            seed_ledger(bench_service, model, args.active)
        bench_service.edit(cases[:1])  # warm
        bench_service.durations.clear()
        idle_pauses = measure_pauses_during(bench_service, lambda: time.sleep(5))
        busy_pauses = measure_pauses_during(bench_service, lambda: edit_and_follow(bench_service, cases[1:]))
    report_durations(report, "Steps of an edit, by phase", bench_service.durations)
    report_durations(
        report,
        "Pauses between two tokens of a stream",
        {"no edit running": idle_pauses, "edits running": busy_pauses},
    )
    limit = max(bench_service.durations["optimize"]) + max(idle_pauses)
    verdict = "within" if max(busy_pauses) <= limit else "ABOVE"
    report.add_note(
        f"{args.active} active edits. The longest pause is {1000 * max(busy_pauses):.0f} ms: {verdict} one "
        "optimization step plus one decode step "
        f"({1000 * limit:.0f} ms)."
    )


if __name__ == "__main__":
    main()
