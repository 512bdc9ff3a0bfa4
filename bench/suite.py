"""Run all benchmarks with quick settings, one after another: `make bench`.

    python bench/suite.py
    python bench/suite.py --reference PATH          # compared with the authors' code
    python bench/suite.py --only edits traces

The reports in runs/bench are combined in runs/bench/report.md. After a failure the other benchmarks still run, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness import REPORTS_DIR, ROOT, console, report_markdown
from bench.meng_reference import REFERENCE_OPTION, add_reference_option


@dataclass(frozen=True)
class BenchScript:
    """A script and the name of the report that it writes."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    uses_reference: bool = False  #: whether it can compare with the authors' code

    def command(self, reference: Path | None, device: str) -> list[str]:
        reference_arguments = (
            (REFERENCE_OPTION, str(reference.resolve())) if self.uses_reference and reference else ()
        )
        device_arguments = ("--device", device) if device != "cpu" else ()
        return [
            sys.executable,
            f"bench/{self.script}",
            *self.arguments,
            *reference_arguments,
            *device_arguments,
        ]


BENCH_SCRIPTS = (
    BenchScript("edits", "edits.py", uses_reference=True),
    BenchScript("edits-batched", "edits.py", ("--batch-size", "16")),
    BenchScript("traces", "traces.py", uses_reference=True),
    BenchScript("generation", "generation.py"),
    BenchScript("covariance_tokens", "covariance_tokens.py"),
    BenchScript("scaling", "scaling.py"),
    BenchScript("pauses", "pauses.py"),
)


@dataclass(frozen=True)
class Outcome:
    """Exit code and duration of one benchmark."""

    name: str
    code: int
    seconds: float

    def __str__(self) -> str:
        ended = "done" if self.code == 0 else f"FAILED with exit code {self.code}"
        return f"{self.name}: {ended} after {self.seconds:.0f} s"


def run_script(script: BenchScript, command: Sequence[str]) -> Outcome:
    """Run one benchmark in a process; its earlier report is removed first."""
    (REPORTS_DIR / f"{script.name}.json").unlink(missing_ok=True)
    began = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return Outcome(script.name, code, time.perf_counter() - began)


def combined_report(outcomes: Sequence[Outcome], folder: Path) -> str:
    """Return the outcomes and all reports as one Markdown text."""
    parts = ["# Benchmarks", "", *(f"- {outcome}" for outcome in outcomes), ""]
    for outcome in outcomes:
        path = folder / f"{outcome.name}.json"
        if path.is_file():
            parts.append(report_markdown(json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_reference_option(p)
    p.add_argument("--only", nargs="+", choices=[b.name for b in BENCH_SCRIPTS], metavar="NAME")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    REPORTS_DIR.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    selected_scripts = [b for b in BENCH_SCRIPTS if not args.only or b.name in args.only]
    for number, script in enumerate(selected_scripts, 1):
        command = script.command(args.reference, args.device)
        console.rule(f"{number} of {len(selected_scripts)}: {' '.join(command[1:])}")
        outcomes.append(run_script(script, command))
        console.print(str(outcomes[-1]))
        (REPORTS_DIR / "report.md").write_text(combined_report(outcomes, REPORTS_DIR), encoding="utf-8")
    console.rule(str(REPORTS_DIR / "report.md"))
    for outcome in outcomes:
        console.print(str(outcome))
    sys.exit(any(outcome.code for outcome in outcomes))


if __name__ == "__main__":
    main()
