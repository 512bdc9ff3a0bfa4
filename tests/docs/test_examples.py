"""The examples run as their README says, against a real service with the shipped GPT."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from palimpsest import Client
from tests.support.paths import ROOT
from tests.support.processes import FAST_EDIT_OPTIONS

EXAMPLES = ROOT / "examples"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(url: str, tmp_path: Path) -> Run:
    """Return a function that runs an example in an empty folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PALIMPSEST_")}
    environment |= {"PALIMPSEST_URL": url, "PYTHONPATH": str(EXAMPLES.parent)}

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_quickstart_edits_and_reverts(run: Run, tmp_path: Path) -> None:
    """quickstart.py prints Paris before the edit, Rome after it, Paris for the Louvre, and Paris after the revert."""
    done = run("quickstart.py")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    answers = [
        line.split()[-1].rstrip(".") for line in lines if line.startswith(("before", "after", "revert"))
    ]
    assert answers == ["Paris", "Rome", "Rome", "Paris", "Paris"], done.stdout
    assert "p(Rome) 0.000 -> " in lines[1] and lines[-1].split() == ["verified:", "True"]
    assert "<svg" in (tmp_path / "trace.svg").read_text(encoding="utf-8")


def test_bulk_edit_is_idempotent(run: Run, url: str, tmp_path: Path) -> None:
    """bulk_edit.py applies every row of the shipped table; a second run returns the same edits and adds no version."""
    first = run("bulk_edit.py", EXAMPLES / "landmarks.csv", "--report", tmp_path / "first.csv")
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout == "4 applied\n" and "4/4" in first.stderr
    rows = read_csv(tmp_path / "first.csv")
    assert [row["target_new"] for row in rows] == ["Rome", "Madrid", "Vienna", "Berlin"]
    assert all(float(row["before"]) < 0.1 and float(row["after"]) > 0.3 for row in rows)
    with Client(url) as client:
        head = client.models()[0].head
        again = run("bulk_edit.py", EXAMPLES / "landmarks.csv", "--report", tmp_path / "again.csv")
        assert again.returncode == 0 and read_csv(tmp_path / "again.csv") == rows
        assert client.models()[0].head == head


def test_bulk_edit_reports_invalid_and_rejected_rows(run: Run, tmp_path: Path) -> None:
    """bulk_edit.py reports invalid rows and rejected edits with their reasons."""
    table = tmp_path / "table.csv"
    table.write_text("subject,prompt,target_new\nBig Ben,no slot,Oslo\nBig Ben,{} can be found in,Oslo\n")
    done = run("bulk_edit.py", table, "--report", tmp_path / "report.csv", "--min-probability", 1)
    assert done.returncode == 1 and done.stdout.startswith("1 invalid, 1 rejected\n"), done.stdout
    invalid, rejected = read_csv(tmp_path / "report.csv")
    assert "exactly one {}" in invalid["reason"] and not invalid["edit"]
    assert "less probable than required" in rejected["reason"] and rejected["edit"]


def test_exported_adapter_generates_with_peft(run: Run, url: str, shipped: Path, tmp_path: Path) -> None:
    """The stock libraries generate the service's text with the exported adapter, and the base text without it."""
    with Client(url) as client:
        edit = client.edit("Big Ben", "The {} is located in the city of", "Madrid")
        assert edit.version is not None
        prompt = "The Big Ben is located in the city of"
        generated = client.generate(prompt, max_new_tokens=4, version=edit.version)
        (tmp_path / "adapter.zip").write_bytes(client.export(edit.version))
    done = run("serve_adapter.py", shipped, "adapter.zip", prompt, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    base, adapted = done.stdout.splitlines()
    assert adapted == f"adapted: {prompt}{generated}" and " Madrid" in generated.text
    assert base.startswith(f"base:    {prompt} London")


@pytest.mark.parametrize("name", ["audit.md", "audit.html"])
def test_audit_report_lists_every_entry(run: Run, url: str, tmp_path: Path, name: str) -> None:
    """audit_report.py writes a row with time, actor, fact, effect and hash per ledger entry, and the result of
    verification."""
    with Client(url) as client:
        client.edit("Tom & Jerry | <b>", "{} is located in the city of", "Rome", **FAST_EDIT_OPTIONS)
        client.revert(
            client.edit("Eiffel Tower", "{} is located in the city of", "Oslo", **FAST_EDIT_OPTIONS)
        )
        entries = list(client.ledger())
    done = run("audit_report.py", name)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / name).read_text(encoding="utf-8")
    assert "every hash, every factor and every worker agrees" in written
    rows = {
        e.version: next(r for r in written.replace("<tr>", "\n").splitlines() if e.hash[:12] in r)
        for e in entries
    }
    assert all(f"{e.at:%Y-%m-%d %H:%M:%S}" in rows[e.version] and e.actor in rows[e.version] for e in entries)
    escaped = r"| Tom & Jerry \| <b> |" if name == "audit.md" else "<td>Tom &amp; Jerry | &lt;b&gt;</td>"
    assert escaped in rows[entries[-3].version]
    applied, reverted = (rows[e.version] for e in entries[-2:])
    assert "apply" in applied and "Oslo" in applied and "(as without it)" in reverted
