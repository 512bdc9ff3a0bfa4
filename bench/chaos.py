"""Inject faults into a deployment under load, and check that every guarantee holds.

    python bench/chaos.py --faults 200 --seed 7 --workers 3
    python bench/chaos.py --seed 7 --plan          print the faults and the load of such a run

The bench starts PostgreSQL, Redis, API processes and workers on loopback. The faults and the load are a
function of the seed, so a failing run can be repeated up to timing. When a check fails, the exit code is 1
and the logs of all processes are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.chaos_checks import PENDING_STATUSES, Check, FinalState, all_passed, reference_key, run_checks
from bench.chaos_clients import ChaosClient
from bench.chaos_plan import FactPool, Fault, build_fact_pool, client_scripts, first_actions, plan_faults
from bench.client_log import ClientLog, GenerationRecord, Resource
from bench.deployment import SupervisedDeployment, managed_deployment, wait_until
from bench.fault_injector import FaultInjector, InjectedFault
from service.settings import SHIPPED_MODEL

FACTS_PATH = SHIPPED_MODEL / "facts.jsonl"
SETTLE_TIMEOUT = 300.0  #: seconds within which every accepted job must end
MAX_ATTEMPTS = 50  #: of a job; the default of 3 would be exhausted by the injected kills
MAX_SHOWN_VIOLATIONS = 5  #: violations printed per check

console = Console(stderr=True)


@dataclass
class ChaosRun:
    """Log, faults, final state and check results of one run."""

    seed: int
    log: ClientLog
    injected_faults: list[InjectedFault]
    final_state: FinalState
    checks: list[Check]
    seconds: float

    @property
    def passed(self) -> bool:
        return all_passed(self.checks)


def run_chaos(args: argparse.Namespace, logs: Path) -> ChaosRun:
    """Start a deployment, inject the planned faults under load, heal it, and check the final state."""
    pool, log, stop = build_fact_pool(FACTS_PATH, args.seed), ClientLog(), threading.Event()
    flags = ["--max-attempts", str(MAX_ATTEMPTS)]
    began = time.monotonic()
    with (
        managed_deployment(logs, args.workers, args.apis, args.lease, flags) as deployment,
        _progress_bar() as bar,
    ):
        _show_status(bar, "starting", None)
        deployment.start()
        injector = FaultInjector(deployment)
        scripts = client_scripts(args.seed, pool)
        chaos_clients = [
            ChaosClient(name, script, deployment.addresses, log, stop) for name, script in scripts.items()
        ]
        for client in chaos_clients:
            client.start()
        inject_faults(injector, planned_faults(args), 60 * args.minutes, bar)
        injector.heal()
        _wait_for_answer(log, injector)
        stop.set()
        _show_status(bar, "waiting for jobs", None)
        for client in chaos_clients:
            client.join()
        deployment.wait_until_ready()
        _wait_for_jobs(deployment, log)
        state = collect_final_state(deployment, log, bar)
        state.unexpected_exits = deployment.stop()
    checks = run_checks(log, state, pool)
    return ChaosRun(args.seed, log, injector.injected_faults, state, checks, time.monotonic() - began)


def planned_faults(args: argparse.Namespace) -> list[Fault]:
    return plan_faults(args.seed, args.faults, args.pause, args.lease)


def inject_faults(injector: FaultInjector, plan: Sequence[Fault], seconds: float, bar: Progress) -> None:
    """Inject each planned fault until `seconds` have passed. With an empty plan, only wait for `seconds`."""
    task = bar.add_task("faults", total=len(plan))
    deadline = time.monotonic() + seconds
    for fault in plan:
        time.sleep(fault.pause)
        if time.monotonic() > deadline:
            break
        bar.update(task, description=fault.kind)
        injector.inject(fault)
        bar.advance(task)
    if not plan:
        time.sleep(seconds)
    bar.remove_task(task)


def _wait_for_answer(log: ClientLog, injector: FaultInjector) -> None:
    """Wait until a request that was sent after the last fault gets a response."""
    last = injector.injected_faults[-1:]
    with suppress(TimeoutError):  # the report then shows inf
        wait_until(
            lambda: max(recovery_times(log, last), default=0.0) < math.inf, "an answer", SETTLE_TIMEOUT
        )


def _wait_for_jobs(deployment: SupervisedDeployment, log: ClientLog) -> None:
    """Wait until no job is queued or running; after a timeout the checks report the open jobs."""

    def quiet() -> bool:
        return not any(
            job["status"] in PENDING_STATUSES
            for path in ("/edits", "/trace")
            for job in deployment.list_all(path)
        )

    try:
        wait_until(quiet, "the end of every job", SETTLE_TIMEOUT)
    except TimeoutError as error:
        log.record_anomaly(str(error))


def collect_final_state(deployment: SupervisedDeployment, log: ClientLog, bar: Progress) -> FinalState:
    """Read the state that the checks compare, and repeat every generation sequentially."""
    reference = collect_reference_texts(deployment, log.generations, bar)
    return FinalState(
        edits=deployment.list_all("/edits"),
        traces=deployment.list_all("/trace"),
        ledger=deployment.list_all("/ledger"),
        verification=deployment.get("/ledger/verify"),
        model=deployment.model(),
        expected_workers=len(deployment.workers),
        queue_leftovers=deployment.queue_leftovers(),
        reference_texts=reference,
    )


def collect_reference_texts(
    deployment: SupervisedDeployment, records: Iterable[GenerationRecord], bar: Progress
) -> dict[str, list[str]]:
    """Return the texts of every recorded request, generated again at its version without load."""
    requests = {reference_key(a.request, a.version): (a.request, a.version) for a in records}
    task = bar.add_task("repeating requests", total=len(requests))
    texts = {}
    with httpx.Client(base_url=deployment.addresses[0], timeout=60) as client:
        for key, (request, version) in requests.items():
            response = client.post("/generate", json={**request, "version": version})
            response.raise_for_status()
            body = response.json()
            texts[key] = [choice["text"] for choice in body.get("choices") or [body]]
            bar.advance(task)
    return texts


# the report


def print_run(run: ChaosRun) -> None:
    for table in (fault_table(run), load_table(run), check_table(run)):
        console.print(table)
    for check in run.checks:
        for violation in check.violations[:MAX_SHOWN_VIOLATIONS]:
            console.print(f"[red]{check.name}:[/] {violation}", highlight=False, soft_wrap=True)
        if (more := len(check.violations) - MAX_SHOWN_VIOLATIONS) > 0:
            console.print(f"[red]{check.name}:[/] and {more} more")


def fault_table(run: ChaosRun) -> Table:
    """Return a table of faults by kind, with the recovery time after each."""
    times = recovery_times(run.log, run.injected_faults)
    table = _table("faults", "kind", "count", "recovery s: median", "longest")
    by_kind = defaultdict(list)
    for injected, seconds in zip(run.injected_faults, times, strict=True):
        by_kind[injected.fault.kind].append(seconds)
    for kind, durations in sorted(by_kind.items()):
        table.add_row(kind, str(len(durations)), f"{median(durations):.1f}", f"{max(durations):.1f}")
    if times:
        table.add_row("all", str(len(times)), f"{median(times):.1f}", f"{max(times):.1f}")
    return table


def recovery_times(log: ClientLog, injected: Sequence[InjectedFault]) -> list[float]:
    """Return, for each fault, the seconds until the response to a request that began after it; inf if there
    is none."""
    answers = [a for a in log.attempts if a.action == "generate" and a.outcome == "200"]
    return [
        min((a.ended - fault.started_at for a in answers if a.began >= fault.started_at), default=math.inf)
        for fault in injected
    ]


def load_table(run: ChaosRun) -> Table:
    """Return a table of requests, their outcomes, and the final statuses of jobs."""
    table = _table("load", "action", "requests", "200", "503", "429", "broken or timed out", "result")
    by_action: dict[str, Counter[str]] = defaultdict(Counter)
    for attempt in run.log.attempts:
        by_action[attempt.action][attempt.outcome] += 1
    ends = {
        "edit": _status_summary(run.final_state.edits),
        "trace": _status_summary(run.final_state.traces),
        "generate": _stream_summary(run.log),
    }
    for action, outcomes in by_action.items():
        status_counts = [outcomes[name] for name in ("200", "503", "429")]
        other = outcomes.total() - sum(status_counts)
        table.add_row(action, *map(str, (outcomes.total(), *status_counts, other)), ends.get(action, ""))
    return table


def _status_summary(jobs: Sequence[Resource]) -> str:
    counts = Counter(job["status"] for job in jobs)
    takeovers = sum(job["attempts"] > 1 for job in jobs)
    return (
        ", ".join(f"{count} {status}" for status, count in counts.most_common())
        + f"; {takeovers} with several attempts"
    )


def _stream_summary(log: ClientLog) -> str:
    streams = [a for a in log.generations if a.tokens is not None]
    incomplete = sum(not a.complete for a in streams)
    restarted = sum(a.resets > 0 for a in streams)
    return f"{len(streams)} streams, {restarted} reset, {incomplete} incomplete"


def check_table(run: ChaosRun) -> Table:
    table = _table("checks", "check", "checked", "violations", "")
    for check in run.checks:
        word = "[green]passed[/]" if check.passed else "[red]FAILED[/]"
        table.add_row(check.name, str(check.checked_count), str(len(check.violations)), word)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or number == len(columns) - 1 else "right")
    return table


def build_report(run: ChaosRun) -> dict[str, Any]:
    """Return the run as JSON."""
    times = recovery_times(run.log, run.injected_faults)
    return {
        "seed": run.seed,
        "passed": run.passed,
        "seconds": round(run.seconds, 1),
        "faults": [
            {**asdict(d.fault), "recovered": round(t, 2)}
            for d, t in zip(run.injected_faults, times, strict=True)
        ],
        "requests": dict(Counter(f"{a.action} {a.outcome}" for a in run.log.attempts)),
        "answers": len(run.log.generations),
        "edits": dict(Counter(edit["status"] for edit in run.final_state.edits)),
        "versions": len(run.final_state.ledger),
        "checks": [asdict(check) for check in run.checks],
    }


def print_plan(args: argparse.Namespace, pool: FactPool) -> None:
    for fault in planned_faults(args):
        console.print(f"{fault.pause:6.2f} s, then {fault.kind} {fault.number} for {fault.seconds} s")
    for name, script in client_scripts(args.seed, pool).items():
        for action in first_actions(script, 20):
            console.print(f"{name}: {json.dumps(asdict(action), ensure_ascii=False)}", soft_wrap=True)


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description:18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _show_status(bar: Progress, message: str, total: int | None) -> None:
    """Replace the tasks of the bar by one line of text."""
    for task in bar.task_ids:
        bar.remove_task(task)
    bar.add_task(message, total=total)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--faults", type=int, default=200)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--workers", type=int, default=3)
    p.add_argument("--apis", type=int, default=2)
    p.add_argument("--lease", type=float, default=3.0, help="seconds of `worker_timeout`")
    p.add_argument("--pause", type=float, default=5.0, help="mean seconds between two faults")
    p.add_argument("--minutes", type=float, default=30.0, help="inject no fault after this time")
    p.add_argument("--plan", action="store_true", help="print the plan and exit")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the report to FILE")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.plan:
        print_plan(args, build_fact_pool(FACTS_PATH, args.seed))
        return 0
    logs = Path(tempfile.mkdtemp(prefix="chaos"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run the cleanup of the context managers
    result = None
    try:
        result = run_chaos(args, logs)
    finally:
        if result is None or not result.passed:
            console.print(f"Logs of all processes: {logs}")
        else:
            shutil.rmtree(logs)
    print_run(result)
    words = f"--faults {args.faults} --seed {args.seed} --workers {args.workers} --apis {args.apis}"
    again = f"python bench/chaos.py {words} --lease {args.lease} --pause {args.pause}"
    console.print(f"{result.seconds / 60:.1f} minutes. To repeat the run: {again}", soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps(build_report(result), indent=1, ensure_ascii=False), encoding="utf-8")
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
