"""Queued edits of a running service, in sequence and in batches. Run by bench/edits.py --batch-size."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench.embedded_service import BenchService
from bench.harness import Report, time_interleaved
from bench.model_shapes import build_model
from service.datasets.loading import read_records
from service.datasets.record import Record
from service.engine.engine import EngineConfig
from service.settings import SHIPPED_MODEL

CHUNK = 16  # edits submitted at once while a ledger is filled


def bench_batched_edits(count: int, active_count: int, rounds: int, report: Report) -> None:
    """Time `count` queued edits, in sequence and as one batch, with `active_count` other edits active."""
    cases = read_records(SHIPPED_MODEL / "facts.jsonl", seed=1)
    others, batch_cases = cases[:active_count], cases[active_count : active_count + count]
    configs = {
        "one after another": EngineConfig(max_edits_per_group=1),
        "batched": EngineConfig(max_edits_per_group=count),
    }
    statuses: dict[str, list[str]] = {name: [] for name in configs}
    applied_edits: dict[str, list[str]] = {name: [] for name in configs}
    with ExitStack() as stack:
        bench_services = {
            name: stack.enter_context(_service_with_edits(pace, others, report.device))
            for name, pace in configs.items()
        }

        def ask(name: str) -> None:
            found = bench_services[name].edit(batch_cases)
            statuses[name] += found.values()
            applied_edits[name] = [edit for edit, status in found.items() if status == "applied"]

        def clear(name: str) -> None:
            _revert_and_wait(bench_services[name], applied_edits[name])

        seconds = time_interleaved(
            {name: partial(ask, name) for name in bench_services}, rounds, prepare=clear
        )
    slow, fast = seconds["one after another"], seconds["batched"]
    rows = [
        [name, s, s.scaled(1 / count), f"{statuses[name].count('applied')} of {len(statuses[name])}"]
        for name, s in seconds.items()
    ]
    columns = ("method", "seconds", "seconds an edit", "applied")
    report.add_table(f"{count} queued edits, {active_count} others active", columns, rows)
    report.add_note(
        f"{count} edits as one batch take 1 / {slow.ratio_to(fast):.3g} of the time, with {active_count} others active."
    )


def _revert_and_wait(bench_service: BenchService, edits: Sequence[str]) -> None:
    """Revert edits and wait until the engine serves the new head."""
    for edit in edits:
        bench_service.container.services.edits.revert(edit, "bench")
    while (
        bench_service.engine.served_version is None
        or bench_service.engine.served_version[0] < bench_service.container.services.ledger.head()
    ):
        time.sleep(0.01)


@contextmanager
def _service_with_edits(
    config: EngineConfig, others: Sequence[Record], device: str
) -> Iterator[BenchService]:
    """Start a service with these edits active."""
    with (
        tempfile.TemporaryDirectory() as folder,
        BenchService(Path(folder), build_model("shipped", device), config) as bench_service,
    ):
        for at in range(0, len(others), CHUNK):
            bench_service.edit(others[at : at + CHUNK])
        yield bench_service
