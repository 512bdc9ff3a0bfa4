"""The examples are run as their README says, against a real service with the shipped GPT."""

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
    """Runs an example in an empty folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PALIMPSEST_")}
    environment |= {"PALIMPSEST_URL": url, "PYTHONPATH": str(EXAMPLES.parent)}

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_quickstart_goes_to_rome_and_back(run: Run, tmp_path: Path) -> None:
    """Paris before, Rome after in another wording too, Paris for the Louvre throughout, and Paris again at the end."""
    done = run("quickstart.py")
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    answers = [
        line.split()[-1].rstrip(".") for line in said if line.startswith(("before", "after", "revert"))
    ]
    assert answers == ["Paris", "Rome", "Rome", "Paris", "Paris"], done.stdout
    assert "p(Rome) 0.000 -> " in said[1] and said[-1].split() == ["verified:", "True"]
    assert "<svg" in (tmp_path / "trace.svg").read_text(encoding="utf-8")


def test_a_table_is_edited_once(run: Run, url: str, tmp_path: Path) -> None:
    """Every row of the shipped table lands; run again, it finds the same edits and makes no version."""
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


def test_rows_that_are_not_applied_are_reported(run: Run, tmp_path: Path) -> None:
    """A row that cannot be an edit and one that the guard rejects stand in the report with their reasons; the others go on."""
    table = tmp_path / "table.csv"
    table.write_text("subject,prompt,target_new\nBig Ben,no slot,Oslo\nBig Ben,{} can be found in,Oslo\n")
    done = run("bulk_edit.py", table, "--report", tmp_path / "report.csv", "--min-probability", 1)
    assert done.returncode == 1 and done.stdout.startswith("1 invalid, 1 rejected\n"), done.stdout
    invalid, rejected = read_csv(tmp_path / "report.csv")
    assert "exactly one {}" in invalid["reason"] and not invalid["edit"]
    assert "less probable than asked for" in rejected["reason"] and rejected["edit"]


def test_an_exported_adapter_generates_with_peft(run: Run, url: str, shipped: Path, tmp_path: Path) -> None:
    """What is exported makes the stock libraries say what the service says, and the base model what it said before."""
    with Client(url) as client:
        edit = client.edit("Big Ben", "The {} is located in the city of", "Madrid")
        asked = "The Big Ben is located in the city of"
        said = client.generate(asked, max_new_tokens=4, version=edit.version)
        (tmp_path / "adapter.zip").write_bytes(client.export(edit.version))
    done = run("serve_adapter.py", shipped, "adapter.zip", asked, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    base, adapted = done.stdout.splitlines()
    assert adapted == f"adapted: {asked}{said}" and " Madrid" in said.text
    assert base.startswith(f"base:    {asked} London")


@pytest.mark.parametrize("name", ["audit.md", "audit.html"])
def test_the_audit_says_who_did_what(run: Run, url: str, tmp_path: Path, name: str) -> None:
    """Every entry of the ledger is a row with its moment, actor, fact, effect and hash; above stands whether all of it agrees."""
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
