"""All benchmarks with their quick settings, one after another: `make bench`.

    python bench/suite.py
    python bench/suite.py --reference PATH          # with the authors' own code beside ours
    python bench/suite.py --only edits traces

What each has kept in runs/bench is put together in runs/bench/report.md. One that fails does not keep the others from
running; the exit code tells.
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

from bench.harness import KEPT, ROOT, console, markdown
from bench.reference import OPTION, add_option


@dataclass(frozen=True)
class Bench:
    """A script, and the name of the report that it keeps."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    compares: bool = False  #: whether it can run the authors' own code beside ours

    def command(self, reference: Path | None, device: str) -> list[str]:
        beside = (OPTION, str(reference.resolve())) if self.compares and reference else ()
        elsewhere = ("--device", device) if device != "cpu" else ()
        return [sys.executable, f"bench/{self.script}", *self.arguments, *beside, *elsewhere]


BENCHES = (
    Bench("edits", "edits.py", compares=True),
    Bench("edits-together", "edits.py", ("--together", "16")),
    Bench("traces", "traces.py", compares=True),
    Bench("generation", "generation.py"),
    Bench("moments", "moments.py"),
    Bench("growth", "growth.py"),
    Bench("pauses", "pauses.py"),
)


@dataclass(frozen=True)
class Outcome:
    """How one benchmark ended."""

    name: str
    code: int
    seconds: float

    def __str__(self) -> str:
        ended = "done" if self.code == 0 else f"FAILED with exit code {self.code}"
        return f"{self.name}: {ended} after {self.seconds:.0f} s"


def run(bench: Bench, command: Sequence[str]) -> Outcome:
    """One benchmark in a process of its own; what it kept before is removed, so that nothing old is taken for new."""
    (KEPT / f"{bench.name}.json").unlink(missing_ok=True)
    began = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return Outcome(bench.name, code, time.perf_counter() - began)


def report(outcomes: Sequence[Outcome], folder: Path) -> str:
    """What the benchmarks kept, as one Markdown text; what failed is said first."""
    parts = ["# Benchmarks", "", *(f"- {outcome}" for outcome in outcomes), ""]
    for outcome in outcomes:
        path = folder / f"{outcome.name}.json"
        if path.is_file():
            parts.append(markdown(json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join(parts)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(p)
    p.add_argument("--only", nargs="+", choices=[b.name for b in BENCHES], metavar="NAME")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    chosen = [b for b in BENCHES if not args.only or b.name in args.only]
    for number, bench in enumerate(chosen, 1):
        command = bench.command(args.reference, args.device)
        console.rule(f"{number} of {len(chosen)}: {' '.join(command[1:])}")
        outcomes.append(run(bench, command))
        console.print(str(outcomes[-1]))
        (KEPT / "report.md").write_text(report(outcomes, KEPT), encoding="utf-8")
    console.rule(str(KEPT / "report.md"))
    for outcome in outcomes:
        console.print(str(outcome))
    sys.exit(any(outcome.code for outcome in outcomes))


if __name__ == "__main__":
    main()
