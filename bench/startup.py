"""Seconds of a start with an empty data folder: until the service is ready, and until its first edit is answered. Then
the seconds of another edit, of a trace of the three kinds and of 80 tokens, one after the other.

    python bench/startup.py --model FOLDER
    python bench/startup.py --model FOLDER --threads 2 --subject "Eiffel Tower" \\
        --prompt "The {} is located in the city of" --target Rome

The first edit is submitted as soon as the service is ready, and one generation while it waits. Processor seconds are
those of the process of the service: on a busy machine they tell more than the clock.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.harness import ROOT, Report
from service.settings import SHIPPED_MODEL

READY = re.compile(r"Palimpsest is ready on (http://\S+)")
POLL_INTERVAL = 0.2  # seconds
TIMEOUT = 3600.0  # seconds
OPEN_STATUSES = ("queued", "running")


class Start:
    """A process of `palimpsest serve`, and the clock since it began."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.output = folder / "output.txt"
        self.began = time.monotonic()
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "cli.main",
                    "serve",
                    "--port",
                    "0",
                    "--data-dir",
                    str(folder),
                    *options,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )

    def times(self) -> tuple[float, float]:
        """Return the seconds by the clock and of processors since the start."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        processor = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - self.began, processor

    def wait_for(self, condition: Any, what: str) -> Any:
        while time.monotonic() - self.began < TIMEOUT:
            if result := condition():
                return result
            if self.process.poll() is not None:
                break
            time.sleep(POLL_INTERVAL)
        raise SystemExit(f"no {what}:\n{self.output.read_text(errors='replace')[-2000:]}")

    def address(self) -> str | None:
        match = READY.search(self.output.read_text(errors="replace"))
        return match[1] if match else None

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--subject", default="Eiffel Tower")
    p.add_argument("--prompt", default="The {} is located in the city of")
    p.add_argument("--target", default="Rome")
    p.add_argument(
        "--other-subject", default="Colosseum", help="subject of the second edit, in the same prompt"
    )
    p.add_argument("--other-target", default="Paris")
    args = p.parse_args()
    report = Report("startup", args.device)
    rows: list[list[str]] = []
    later: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        options = ["--model", args.model, "--device", args.device, "--threads", str(args.threads)]
        start = Start(Path(folder), options)
        try:
            with httpx.Client(base_url=start.wait_for(start.address, "address"), timeout=TIMEOUT) as http:
                edit = measure(start, http, args, rows)
                later = measure_requests(http, args)
        finally:
            start.stop()
    report.add_table(
        f"A first start ({Path(args.model).name}, {args.threads} threads)",
        ("event", "seconds", "of processors"),
        rows,
    )
    report.add_table("Requests after it", ("request", "seconds", "outcome"), later)
    result = edit.get("result") or edit.get("error") or {}
    details = [str(result[key]) for key in ("layer_search", "detail") if result.get(key)]
    report.add_note(": ".join([f"The edit is {edit['status']}", *details]) + ".")
    report.add_note(f"Load of the machine: {', '.join(f'{load:.1f}' for load in os.getloadavg())}.")


def measure(
    start: Start, http: httpx.Client, args: argparse.Namespace, rows: list[list[str]]
) -> dict[str, Any]:
    """Add a row for each event of the start. Return the edit."""

    def note(event: str) -> None:
        rows.append([event, *(f"{seconds:.1f}" for seconds in start.times())])

    start.wait_for(lambda: http.get("/readyz").status_code == 200, "readiness")
    note("ready")
    body = {"subject": args.subject, "prompt": args.prompt, "target_new": args.target}
    submitted = http.post("/edits", json=body).raise_for_status().json()
    http.post("/generate", json={"prompt": args.prompt.replace("{}", args.subject), "max_new_tokens": 8})
    note("first generation answered")

    def state() -> dict[str, Any]:
        return dict(http.get(f"/edits/{submitted['id']}").json())

    def past_statistics() -> bool:
        edit = state()
        phase = (edit["progress"] or {"phase": "statistics"})["phase"]
        return edit["status"] not in OPEN_STATUSES or phase not in ("statistics", "answer")

    start.wait_for(past_statistics, "statistics")
    note("statistics collected")
    start.wait_for(lambda: state()["status"] not in OPEN_STATUSES, "end of the edit")
    note("first edit answered")
    return state()


def measure_requests(http: httpx.Client, args: argparse.Namespace) -> list[list[str]]:
    """Return a row for an edit, a trace and a generation, each answered before the next is sent."""
    edit = {"subject": args.other_subject, "prompt": args.prompt, "target_new": args.other_target}
    trace = {"subject": args.other_subject, "prompt": args.prompt}
    generation = {"prompt": "Once upon a time", "max_new_tokens": 80, "temperature": 0}
    return [
        ["edit", *time_job(http, "/edits", edit)],
        ["trace of three kinds", *time_job(http, "/trace", trace)],
        ["80 tokens", *time_generation(http, generation)],
    ]


def time_job(http: httpx.Client, path: str, body: dict[str, Any]) -> tuple[str, str]:
    """Submit a job. Return the seconds until it ends, and its status."""
    began = time.monotonic()
    job = http.post(path, json=body).raise_for_status().json()
    while job["status"] in OPEN_STATUSES:
        time.sleep(POLL_INTERVAL)
        job = http.get(f"{path}/{job['id']}").json()
    return f"{time.monotonic() - began:.1f}", job["status"]


def time_generation(http: httpx.Client, body: dict[str, Any]) -> tuple[str, str]:
    """Generate. Return the seconds and the number of tokens."""
    began = time.monotonic()
    answer = http.post("/generate", json=body).raise_for_status().json()
    return f"{time.monotonic() - began:.1f}", f"{answer['usage']['completion_tokens']} tokens"


if __name__ == "__main__":
    main()
