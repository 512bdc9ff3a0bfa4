"""Kill, freeze, cut and empty everything, at random and under load, and see that every promise holds.

    python bench/chaos.py --faults 200 --seed 7 --workers 3
    python bench/chaos.py --seed 7 --plan          what such a run will do

PostgreSQL, Redis, API processes and workers are its own, on loopback. Faults and load are a function of the seed: a
failing run is replayed with it, as far as the machine's own timing allows. The exit code is 1 when a check fails; the
logs of all processes are kept then.
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

from bench.deployment import Deployment, deployed, until
from bench.journal import Answer, Journal, Resource
from bench.load import Client
from bench.mischief import Done, Mischief
from bench.plan import Fault, World, clients, faults, first, world
from bench.verdict import OPEN, Check, Found, passed, reference_key, verdict
from service.settings import SHIPPED_MODEL

FACTS = SHIPPED_MODEL / "facts.jsonl"
QUIET = 300.0  #: seconds within which everything that was accepted ends
ATTEMPTS = 50  #: of a job: with so many kills three would give honest jobs up
SHOWN = 5  #: violations of one check that are shown

console = Console(stderr=True)


@dataclass
class Run:
    """What happened, and what is to be said of it."""

    seed: int
    journal: Journal
    done: list[Done]
    found: Found
    checks: list[Check]
    seconds: float

    @property
    def passed(self) -> bool:
        return passed(self.checks)


def run(args: argparse.Namespace, logs: Path) -> Run:
    """Start everything, let it be disturbed, heal it, and look at what is left."""
    place, journal, stop = world(FACTS, args.seed), Journal(), threading.Event()
    flags = ["--max-attempts", str(ATTEMPTS)]
    began = time.monotonic()
    with deployed(logs, args.workers, args.apis, args.lease, flags) as house, _bar() as bar:
        _say(bar, "starting", None)
        house.start()
        mischief = Mischief(house)
        scripts = clients(args.seed, place)
        crowd = [Client(name, script, house.addresses, journal, stop) for name, script in scripts.items()]
        for client in crowd:
            client.start()
        disturb(mischief, planned(args), 60 * args.minutes, bar)
        mischief.heal()
        _await_answer(journal, mischief)
        stop.set()
        _say(bar, "waiting for quiet", None)
        for client in crowd:
            client.join()
        house.wait_until_whole()
        _await_ends(house, journal)
        found = look(house, journal, bar)
        found.exits = house.stop()
    checks = verdict(journal, found, place)
    return Run(args.seed, journal, mischief.done, found, checks, time.monotonic() - began)


def planned(args: argparse.Namespace) -> list[Fault]:
    return faults(args.seed, args.faults, args.pause, args.lease)


def disturb(mischief: Mischief, plan: Sequence[Fault], seconds: float, bar: Progress) -> None:
    """Fault after fault, until they are done or the time is up. Without any, the load runs for that time alone."""
    task = bar.add_task("faults", total=len(plan))
    deadline = time.monotonic() + seconds
    for fault in plan:
        time.sleep(fault.pause)
        if time.monotonic() > deadline:
            break
        bar.update(task, description=fault.kind)
        mischief.do(fault)
        bar.advance(task)
    if not plan:
        time.sleep(seconds)
    bar.remove_task(task)


def _await_answer(journal: Journal, mischief: Mischief) -> None:
    """The load goes on until something that was asked after the last fault is answered."""
    last = mischief.done[-1:]
    with suppress(TimeoutError):  # a report without it says so
        until(lambda: max(recoveries(journal, last), default=0.0) < math.inf, "an answer", QUIET)


def _await_ends(house: Deployment, journal: Journal) -> None:
    """Until no job is open. Those that never end are found by the check."""

    def quiet() -> bool:
        return not any(job["status"] in OPEN for path in ("/edits", "/trace") for job in house.pages(path))

    try:
        until(quiet, "the end of every job", QUIET)
    except TimeoutError as error:
        journal.trouble(str(error))


def look(house: Deployment, journal: Journal, bar: Progress) -> Found:
    """Read everything that the checks compare, and ask every question again, one at a time."""
    reference = ask_again(house, journal.answers, bar)
    return Found(
        edits=house.pages("/edits"),
        traces=house.pages("/trace"),
        ledger=house.pages("/ledger"),
        verify=house.get("/ledger/verify"),
        model=house.model(),
        workers=len(house.workers),
        leftovers=house.leftovers(),
        reference=reference,
    )


def ask_again(house: Deployment, answers: Iterable[Answer], bar: Progress) -> dict[str, list[str]]:
    """What the service says when nothing disturbs it, to every question that was answered, at the version of the answer."""
    questions = {reference_key(a.asked, a.version): (a.asked, a.version) for a in answers}
    task = bar.add_task("asking again", total=len(questions))
    said = {}
    with httpx.Client(base_url=house.addresses[0], timeout=60) as client:
        for key, (asked, version) in questions.items():
            found = client.post("/generate", json={**asked, "version": version})
            found.raise_for_status()
            body = found.json()
            said[key] = [choice["text"] for choice in body.get("choices") or [body]]
            bar.advance(task)
    return said


# the report


def show(run: Run) -> None:
    for table in (fault_table(run), load_table(run), check_table(run)):
        console.print(table)
    for check in run.checks:
        for words in check.violations[:SHOWN]:
            console.print(f"[red]{check.name}:[/] {words}", highlight=False, soft_wrap=True)
        if (more := len(check.violations) - SHOWN) > 0:
            console.print(f"[red]{check.name}:[/] and {more} more")


def fault_table(run: Run) -> Table:
    """Faults by kind, and how long after them the next question was answered that was asked after them."""
    times = recoveries(run.journal, run.done)
    table = _table("faults", "kind", "count", "next answer after s: median", "longest")
    by_kind = defaultdict(list)
    for done, seconds in zip(run.done, times, strict=True):
        by_kind[done.fault.kind].append(seconds)
    for kind, found in sorted(by_kind.items()):
        table.add_row(kind, str(len(found)), f"{median(found):.1f}", f"{max(found):.1f}")
    if times:
        table.add_row("all", str(len(times)), f"{median(times):.1f}", f"{max(times):.1f}")
    return table


def recoveries(journal: Journal, done: Sequence[Done]) -> list[float]:
    """For each fault the seconds until a question was answered that was asked after it."""
    answers = [a for a in journal.attempts if a.action == "generate" and a.outcome == "200"]
    return [min((a.ended - one.at for a in answers if a.began >= one.at), default=math.inf) for one in done]


def load_table(run: Run) -> Table:
    """What was asked, what became of it on the wire, and how the jobs ended."""
    table = _table("load", "what", "requests", "answered", "503", "429", "broken or silent", "came to")
    by_action: dict[str, Counter[str]] = defaultdict(Counter)
    for attempt in run.journal.attempts:
        by_action[attempt.action][attempt.outcome] += 1
    ends = {
        "edit": _ends(run.found.edits),
        "trace": _ends(run.found.traces),
        "generate": _kinds(run.journal),
    }
    for action, outcomes in by_action.items():
        known = [outcomes[name] for name in ("200", "503", "429")]
        other = outcomes.total() - sum(known)
        table.add_row(action, *map(str, (outcomes.total(), *known, other)), ends.get(action, ""))
    return table


def _ends(jobs: Sequence[Resource]) -> str:
    counts = Counter(job["status"] for job in jobs)
    tries = sum(job["attempts"] > 1 for job in jobs)
    return ", ".join(f"{count} {status}" for status, count in counts.most_common()) + f"; {tries} taken over"


def _kinds(journal: Journal) -> str:
    streams = [a for a in journal.answers if a.tokens is not None]
    parts = sum(not a.complete for a in streams)
    restarted = sum(a.restarts > 0 for a in streams)
    return f"{len(streams)} streams, {restarted} restarted, {parts} broken off"


def check_table(run: Run) -> Table:
    table = _table("checks", "check", "looked at", "wrong", "")
    for check in run.checks:
        word = "[green]passed[/]" if check.passed else "[red]FAILED[/]"
        table.add_row(check.name, str(check.looked_at), str(len(check.violations)), word)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or number == len(columns) - 1 else "right")
    return table


def report(run: Run) -> dict[str, Any]:
    """Everything that a later reader may want, as JSON."""
    times = recoveries(run.journal, run.done)
    return {
        "seed": run.seed,
        "passed": run.passed,
        "seconds": round(run.seconds, 1),
        "faults": [
            {**asdict(d.fault), "recovered": round(t, 2)} for d, t in zip(run.done, times, strict=True)
        ],
        "requests": dict(Counter(f"{a.action} {a.outcome}" for a in run.journal.attempts)),
        "answers": len(run.journal.answers),
        "edits": dict(Counter(edit["status"] for edit in run.found.edits)),
        "versions": len(run.found.ledger),
        "checks": [asdict(check) for check in run.checks],
    }


def show_plan(args: argparse.Namespace, place: World) -> None:
    for fault in planned(args):
        console.print(f"{fault.pause:6.2f} s, then {fault.kind} {fault.number} for {fault.seconds} s")
    for name, script in clients(args.seed, place).items():
        for wish in first(script, 20):
            console.print(f"{name}: {json.dumps(asdict(wish), ensure_ascii=False)}", soft_wrap=True)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description:18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _say(bar: Progress, words: str, total: int | None) -> None:
    """The one line of the bar that is not a count."""
    for task in bar.task_ids:
        bar.remove_task(task)
    bar.add_task(words, total=total)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--faults", type=int, default=200)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--workers", type=int, default=3)
    p.add_argument("--apis", type=int, default=2)
    p.add_argument("--lease", type=float, default=3.0, help="seconds")
    p.add_argument("--pause", type=float, default=5.0, help="mean seconds between two faults")
    p.add_argument("--minutes", type=float, default=30.0, help="no fault begins after that")
    p.add_argument("--plan", action="store_true", help="print what the run would do")
    p.add_argument("--json", type=Path, metavar="FILE", help="keep the report")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.plan:
        show_plan(args, world(FACTS, args.seed))
        return 0
    logs = Path(tempfile.mkdtemp(prefix="chaos"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whoever ends us leaves no processes behind
    result = None
    try:
        result = run(args, logs)
    finally:
        if result is None or not result.passed:
            console.print(f"logs of all processes: {logs}")
        else:
            shutil.rmtree(logs)
    show(result)
    words = f"--faults {args.faults} --seed {args.seed} --workers {args.workers} --apis {args.apis}"
    again = f"python bench/chaos.py {words} --lease {args.lease} --pause {args.pause}"
    console.print(f"{result.seconds / 60:.1f} minutes; the same again: {again}", soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps(report(result), indent=1, ensure_ascii=False), encoding="utf-8")
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
