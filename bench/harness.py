"""Interleaved timing of alternatives, and reports as printed and saved tables.

Alternatives are timed in turn within each round, so that other load on the machine affects all of them. Their
ratio is reported. A report is printed and saved with a description of the machine in runs/bench/NAME.json.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.table import Table

T = TypeVar("T")

console = Console()
ROOT = Path(__file__).resolve().parent.parent
REPORTS_DIR = ROOT / "runs" / "bench"


@dataclass(frozen=True)
class Spread:
    """Repeated measurements, formatted as median and quartiles."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def ratio_to(self, other: Spread) -> Spread:
        """Return the ratios by round; load common to both cancels."""
        return Spread(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))

    def scaled(self, factor: float) -> Spread:
        return Spread(tuple(v * factor for v in self.values))

    def __format__(self, form: str) -> str:
        low, high = self.quartiles
        return f"{self.median:{form}} ({low:{form}} to {high:{form}})"


class ResultRecorder(Generic[T]):
    """A callable that keeps the result of its last call."""

    result: T

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work

    def __call__(self) -> None:
        self.result = self.work()


def time_interleaved(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    synchronise: Callable[[], None] = lambda: None,
    prepare: Callable[[str], object] = lambda name: None,
) -> dict[str, Spread]:
    """Return the seconds of each task. A round runs every task once; the order rotates from round to round.

    `prepare(name)` runs before each task and is not timed.
    """
    names = list(tasks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        offset = number % len(names)
        for name in names[offset:] + names[:offset]:
            prepare(name)
            gc.collect()
            synchronise()
            began = time.perf_counter()
            tasks[name]()
            synchronise()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: Spread(tuple(values)) for name, values in seconds.items()}


def device_synchronizer(device: str) -> Callable[[], None]:
    """Return a function that waits until the device has finished its queued work."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def machine_info(device: str = "cpu") -> dict[str, Any]:
    """Return the hardware, library versions and commit of a measurement."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def _commit() -> str | None:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None


@dataclass
class Report:
    """The tables and notes of one benchmark."""

    name: str
    device: str = "cpu"
    tables: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print and save a table. A `Spread` is shown as median (quartiles) with three digits."""
        rich_table = Table(title=title, title_justify="left")
        for i, name in enumerate(columns):
            rich_table.add_column(name, justify="right" if i else "left")
        cells = [[_format_cell(x) for x in row] for row in rows]
        for row in cells:
            rich_table.add_row(*row)
        console.print(rich_table)
        self.tables.append({"title": title, "columns": list(columns), "rows": cells})
        self._save()

    def add_note(self, text: str) -> None:
        """Print and save a sentence about the tables."""
        console.print(text)
        self.notes.append(text)
        self._save()

    def _save(self) -> None:
        """Write the report; called after every table, so that an interrupted run keeps its results."""
        REPORTS_DIR.mkdir(parents=True, exist_ok=True)
        content = {
            "name": self.name,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            "machine": machine_info(self.device),
            "tables": self.tables,
            "notes": self.notes,
        }
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (REPORTS_DIR / f"{self.name}.json").write_text(text, encoding="utf-8")


def _format_cell(value: object) -> str:
    if isinstance(value, Spread):
        return f"{value:.3g}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report_markdown(report: Mapping[str, Any]) -> str:
    """Return a saved report as Markdown."""
    lines = [f"## {report['name']}", "", f"`{report['command']}`, {report['when']}", ""]
    for table in report["tables"]:
        lines += [
            f"**{table['title']}**",
            "",
            _markdown_row(table["columns"]),
            _markdown_row(["---"] * len(table["columns"])),
        ]
        lines += [*(_markdown_row(row) for row in table["rows"]), ""]
    lines += [f"- {note}" for note in report["notes"]]
    return "\n".join([*lines, ""])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
