"""How long a streaming generation waits while edits run beside it, on the shipped GPT.

    python bench/pauses.py --edits 8

Prints the durations of one decode step alone, of the steps of an edit by phase, and of the pauses between two tokens of a stream
while edits run; then whether the longest pause stays below one optimisation step plus one decode step.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from service.bootstrap import wire
from service.evaluation.cases import Case, read_cases
from service.ids import new_id
from service.jobs.desk import Desk, RunningJob
from service.models.loading import load
from service.progress import Steps, finish
from service.requests import EditRequest, GenerateRequest
from service.serving.engine import Engine, Task
from service.serving.replica import Replica
from service.settings import SHIPPED_MODEL, Settings
from service.toolkit import prepare_steps
from workers.card import card, tokenizer_json
from workers.tasks import tasks

console = Console()
Durations = dict[str, list[float]]


def timed(task: Task, durations: Durations) -> Task:
    """The same task; how long each of its steps took is kept by phase."""

    def run(job: RunningJob) -> Steps[None]:
        steps = task(job)
        while True:
            began = time.perf_counter()
            try:
                progress = next(steps)
            except StopIteration:
                durations["commit"].append(time.perf_counter() - began)
                return
            durations[progress.phase].append(time.perf_counter() - began)
            yield progress

    return run


async def listen(house: House, stop: threading.Event) -> list[float]:
    """One stream after another until told to stop; the pauses between tokens of one stream."""
    pauses: list[float] = []
    request = GenerateRequest(
        prompt="The Eiffel Tower", max_new_tokens=80, stream=True, version="base", temperature=0.8
    )
    while not stop.is_set():
        last = None
        channel = house.wired.operations.generate(request)
        async for event in house.wired.broker.events(channel):
            now = time.perf_counter()
            if event.name == "token":
                if last is not None:
                    pauses.append(now - last)
                last = now
    return pauses


class House:
    """The embedded wiring with a stop-watch on every job."""

    def __init__(self, folder: Path, model: str) -> None:
        settings = Settings(data=folder)
        self.wired = wire(settings)
        self.wired.database.migrate()
        loaded = load(model)
        toolkit = finish(prepare_steps(loaded, folder))
        desk = Desk(self.wired.database, self.wired.broker, loaded.fingerprint, new_id("worker"), sole=True)
        replica = Replica(loaded, desk)
        self.durations: Durations = defaultdict(list)
        work = {kind: timed(task, self.durations) for kind, task in tasks(replica, desk, toolkit).items()}
        self.engine = Engine(replica, desk, self.wired.broker, work)
        desk.register(card(loaded, toolkit), tokenizer_json(loaded))
        desk.heartbeat(0, None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.engine.run, args=(self._stop,))
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self.wired.broker.wake()
        self._thread.join()
        self.wired.close()


def stream_during(house: House, work: object) -> list[float]:
    """The pauses of a stream while `work()` runs in another thread."""
    stop = threading.Event()
    found: list[float] = []
    listener = threading.Thread(target=lambda: found.extend(asyncio.run(listen(house, stop))))
    listener.start()
    work()  # type: ignore[operator]
    stop.set()
    listener.join()
    return found


def edit_all(house: House, cases: list[Case]) -> None:
    """Submit the cases with their probes and wait for their ends."""
    requests = [
        EditRequest.model_validate(
            {
                "subject": c.subject,
                "prompt": c.prompt,
                "target_new": c.target_new,
                "target_true": c.target_true,
                "probes": {
                    "paraphrase": list(c.paraphrases),
                    "neighborhood": [{"prompt": p, "target": c.target_true} for p in c.neighbours],
                },
            }
        )
        for c in cases
    ]
    waiting = [r["id"] for r in house.wired.operations.submit_edits(requests, "bench", None)]
    while any(house.wired.operations.edit(i)["status"] in ("queued", "running") for i in waiting):
        time.sleep(0.1)


def show(title: str, durations: Durations) -> None:
    table = Table(title=title)
    for name in ("", "count", "median ms", "p95 ms", "p99 ms", "longest ms"):
        table.add_column(name, justify="right")
    for name, values in durations.items():
        ms = 1000 * np.asarray(values)
        figures = (np.median(ms), np.quantile(ms, 0.95), np.quantile(ms, 0.99), ms.max())
        table.add_row(name, str(len(ms)), *(f"{x:.1f}" for x in figures))
    console.print(table)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument("--edits", type=int, default=8)
    p.add_argument("--threads", type=int, default=None)
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = read_cases(Path(args.model) / "facts.jsonl", seed=1)[: args.edits + 1]
    with tempfile.TemporaryDirectory() as folder:
        house = House(Path(folder), args.model)
        try:
            edit_all(house, cases[:1])  # warm
            house.durations.clear()
            alone = stream_during(house, lambda: time.sleep(5))
            beside = stream_during(house, lambda: edit_all(house, cases[1:]))
        finally:
            house.close()
    show("steps of an edit, by phase", house.durations)
    show("pauses between two tokens of a stream", {"no edit running": alone, "edits running": beside})
    limit = max(house.durations["optimise"]) + max(alone)
    verdict = "within" if max(beside) <= limit else "ABOVE"
    console.print(
        f"longest pause {1000 * max(beside):.1f} ms: {verdict} one optimisation step plus one decode step ({1000 * limit:.1f} ms)"
    )


if __name__ == "__main__":
    main()
