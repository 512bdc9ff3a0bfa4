"""Memory and freezes that hostile requests and the largest answers cause in the API process.

    python bench/abuse.py
    python bench/abuse.py --only import --repeat 5

Each case, or group of similar cases, runs in a server of its own: the largest request that a route accepts, the worst
known ones, 30 of them at the same time, and the largest answers. The table has the peak of the resident memory above
the idle process, and the longest freeze of the event loop: what any other client waits in addition. The freeze of a
case is the shortest of its repetitions, because a freeze that the service causes is in all of them. The exit status
is 1 when a case exceeds a bound or has another status than expected.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from bench.abuse_cases import Case, all_cases

MAX_MEMORY = 250e6  #: bytes above the idle process
MAX_FREEZE = 0.100  #: seconds
IDLE_SECONDS = 1.0  #: for which the idle server is measured
SETTLE_SECONDS = 0.3  #: after a request, for what it leaves running
TIMEOUT = 300.0  #: seconds of one request
CHUNK = 65_536
MAX_PARALLEL_REPEATS = 2  #: of a case with many requests at the same time
ROOT = Path(__file__).resolve().parent.parent

console = Console(stderr=True)


@dataclass(frozen=True)
class Reading:
    """What a server reports about the time since its last reading."""

    freeze: float  #: seconds
    resident: int  #: bytes
    peak: int


@dataclass(frozen=True)
class Outcome:
    """The figures of one case."""

    case: Case
    sent: int  #: bytes of a request
    statuses: tuple[int, ...]  #: of all requests, each once
    seconds: float  #: of the last repetition
    answer: int  #: bytes of the largest answer
    memory: int  #: bytes above the idle process, the most of all repetitions
    freezes: tuple[float, ...]  #: seconds, of each repetition

    @property
    def failures(self) -> list[str]:
        """Return what exceeds a bound or is not as expected."""
        found = []
        if not set(self.statuses) <= set(self.case.statuses):
            found.append(f"status {self.statuses}")
        if self.memory > MAX_MEMORY:
            found.append("memory")
        if min(self.freezes) > MAX_FREEZE:
            found.append("freeze")
        return found


class MeasuredServer:
    """A running `bench/abuse_server.py`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._input, self._output = process.stdin, process.stdout
        self.address = urlsplit(self._output.readline().strip()).netloc

    def read(self) -> Reading:
        self._input.write("\n")
        self._input.flush()
        return Reading(**json.loads(self._output.readline()))

    def send(self, case: Case, body: bytes) -> tuple[int, int]:
        """Send the request of a case. Return the status and the bytes of the answer, which is not kept."""
        connection = http.client.HTTPConnection(self.address, timeout=TIMEOUT)
        try:
            connection.request(case.method, case.path, body or None, case.headers)
            answer = connection.getresponse()
            size = 0
            while chunk := answer.read(CHUNK):
                size += len(chunk)
            return answer.status, size
        except ConnectionError:
            return 0, 0
        finally:
            connection.close()

    def send_all(self, case: Case, body: bytes) -> list[tuple[int, int]]:
        """Send the request of a case as often at the same time as it says."""
        answers: list[tuple[int, int]] = []
        threads = [
            threading.Thread(target=lambda: answers.append(self.send(case, body)))
            for _ in range(case.parallel)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


@contextmanager
def filled_store() -> Iterator[Path]:
    """Yield a folder with the store that every server gets a copy of."""
    with tempfile.TemporaryDirectory(prefix="abuse") as folder:
        subprocess.run([sys.executable, "-m", "bench.abuse_server", "fill", folder], cwd=ROOT, check=True)
        yield Path(folder)


@contextmanager
def measured_server(store: Path) -> Iterator[MeasuredServer]:
    """Run a server on a copy of the store."""
    with tempfile.TemporaryDirectory(prefix="abuse") as folder:
        shutil.copytree(store, folder, dirs_exist_ok=True)
        command = [sys.executable, "-m", "bench.abuse_server", "serve", folder]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        ) as process:
            try:
                yield MeasuredServer(process)
            finally:
                process.kill()


def measure_idle(server: MeasuredServer) -> Reading:
    """Return the reading of a server that has answered one request and then none."""
    server.send(Case("", "GET", "/readyz"), b"")
    server.read()
    time.sleep(IDLE_SECONDS)
    return server.read()


def measure(server: MeasuredServer, idle: Reading, case: Case, repeat: int) -> Outcome:
    """Return the figures of a case."""
    body = case.body()
    statuses: set[int] = set()
    freezes, memory, size, seconds = [], 0, 0, 0.0
    for _ in range(repeat):
        began = time.perf_counter()
        answers = server.send_all(case, body)
        seconds = time.perf_counter() - began
        time.sleep(SETTLE_SECONDS)
        reading = server.read()
        statuses |= {status for status, _ in answers}
        size = max(size, *(length for _, length in answers))
        freezes.append(reading.freeze)
        memory = max(memory, reading.peak - idle.resident)
    return Outcome(case, len(body), tuple(sorted(statuses)), seconds, size, memory, tuple(freezes))


def measure_group(store: Path, cases: Sequence[Case], repeat: int) -> tuple[list[Outcome], Reading]:
    """Return the figures of cases, one after another in one server, and the reading of the server when idle."""
    outcomes = []
    with measured_server(store) as server:
        idle = measure_idle(server)
        for case in cases:
            outcomes.append(
                measure(
                    server, idle, case, min(repeat, MAX_PARALLEL_REPEATS) if case.parallel > 1 else repeat
                )
            )
            o = outcomes[-1]
            console.print(
                f"{case.method} {case.path}, {case.name} x {case.parallel}: {o.statuses} {o.memory / 1e6:.0f} MB, "
                f"{1000 * min(o.freezes):.0f} ms, {o.seconds:.1f} s {o.failures or ''}"
            )
    return outcomes, idle


def print_table(outcomes: Sequence[Outcome], idle: Sequence[Reading]) -> None:
    table = Table(
        title=f"Bounds: {MAX_MEMORY / 1e6:.0f} MB, {1000 * MAX_FREEZE:.0f} ms", title_justify="left"
    )
    for name in (
        "route",
        "request",
        "status",
        "MB sent",
        "MB answered",
        "seconds",
        "MB above idle",
        "freeze in ms",
        "",
    ):
        table.add_column(name, justify="left" if name in ("route", "request", "") else "right")
    for o in outcomes:
        table.add_row(
            f"{o.case.method} {o.case.path}",
            o.case.name + (f", {o.case.parallel} at once" if o.case.parallel > 1 else ""),
            " ".join(map(str, o.statuses)),
            f"{o.sent / 1e6:.1f}",
            f"{o.answer / 1e6:.1f}",
            f"{o.seconds:.1f}",
            f"{o.memory / 1e6:.0f}",
            f"{1000 * min(o.freezes):.0f} to {1000 * max(o.freezes):.0f}",
            ", ".join(o.failures),
        )
    Console(width=160).print(table)
    freezes = sorted(reading.freeze for reading in idle)
    resident = max(reading.resident for reading in idle)
    print(
        f"Idle: {resident / 1e6:.0f} MB resident; longest freeze in {IDLE_SECONDS:.0f} s: "
        f"{1000 * freezes[len(freezes) // 2]:.0f} ms (median), {1000 * freezes[-1]:.0f} ms (longest)."
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeat", type=int, default=3, help="repetitions of each case")
    p.add_argument(
        "--only", nargs="+", metavar="TEXT", help="only the cases whose route or name has one of these"
    )
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    groups: dict[str, list[Case]] = {}
    for case in all_cases():
        if not args.only or any(text in f"{case.path} {case.name}" for text in args.only):
            groups.setdefault(case.group or f"{case}", []).append(case)
    outcomes, idle = [], []
    with filled_store() as store:
        for cases in groups.values():
            found, reading = measure_group(store, cases, args.repeat)
            outcomes += found
            idle.append(reading)
    print_table(outcomes, idle)
    return int(any(outcome.failures for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
