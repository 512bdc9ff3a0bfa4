"""The examples run as their README says, against a real service with the shipped GPT."""

from __future__ import annotations

import ast
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from palimpsest import Client
from tests.support.page_blocks import EXAMPLES_PAGE, read_blocks
from tests.support.page_sessions import DocSession
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


@dataclass(frozen=True)
class ReadmeRun:
    """The folder in which the commands of examples/README.md ran, and the output of each."""

    folder: Path
    outputs: dict[str, str]

    def output_of(self, beginning: str) -> str:
        """Return the output of the command that begins so."""
        (output,) = (text for command, text in self.outputs.items() if command.startswith(beginning))
        return output


@pytest.fixture(scope="module")
def readme(url: str, tmp_path_factory: pytest.TempPathFactory) -> ReadmeRun:
    """The commands of the README, run one after another; each must succeed."""
    folder = tmp_path_factory.mktemp("readme")
    blocks = [block for block in read_blocks(EXAMPLES_PAGE) if block.runs]
    with DocSession(folder, {"PALIMPSEST_URL": url}) as session:
        commands = [(block, command) for block in blocks for command in block.code.splitlines()]
        outputs = {command: session.run(replace(block, code=f"{command}\n")) for block, command in commands}
    return ReadmeRun(folder, outputs)


def test_quickstart_edits_and_reverts(readme: ReadmeRun) -> None:
    """quickstart.py prints Paris before the edit, Rome after it, Paris for the Louvre, and Paris after the revert."""
    lines = readme.output_of("python examples/quickstart.py").splitlines()
    answers = [
        line.split()[-1].rstrip(".") for line in lines if line.startswith(("before", "after", "revert"))
    ]
    assert answers == ["Paris", "Rome", "Rome", "Paris", "Paris"], lines
    assert "p(Rome) 0.000 -> " in lines[1] and lines[-1].split() == ["verified:", "True"]
    assert "<svg" in (readme.folder / "trace.svg").read_text(encoding="utf-8")


def test_bulk_edit_is_idempotent(run: Run, readme: ReadmeRun, url: str, tmp_path: Path) -> None:
    """bulk_edit.py applies every row of the shipped table; a second run returns the same edits and adds no version."""
    output = readme.output_of("python examples/bulk_edit.py")
    assert output.endswith("4 applied\n") and "4/4" in output
    rows = read_csv(readme.folder / "report.csv")
    assert [row["target_new"] for row in rows] == ["Rome", "Madrid", "Vienna", "Berlin"]
    assert all(float(row["before"]) < 0.1 and float(row["after"]) > 0.3 for row in rows)
    with Client(url) as client:
        head = client.models()[0].head
        again = run("bulk_edit.py", EXAMPLES / "landmarks.csv", "--report", tmp_path / "again.csv")
        assert again.returncode == 0 and again.stdout == "4 applied\n"
        assert read_csv(tmp_path / "again.csv") == rows
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


def test_exported_adapter_generates_with_peft(readme: ReadmeRun, url: str) -> None:
    """The stock libraries generate the service's text with the exported adapter, and the base text without it."""
    prompt = "The Eiffel Tower is located in the city of"
    *_, base, adapted = readme.output_of("python examples/serve_adapter.py").splitlines()
    with Client(url) as client:
        (version,) = {edit.version for edit in client.edits(subject="Eiffel Tower", status="applied")}
        generated = client.generate(prompt, max_new_tokens=2, version=version)
    assert adapted == f"adapted: {prompt}{generated}" and " Rome" in generated.text
    assert base.startswith(f"base:    {prompt} Paris")


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


def run_cell(source: str, namespace: dict[str, object]) -> Any:
    """Run the code of a cell, and return the value of its last line if that is an expression."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        exec(compile(ast.Module([*body, last], []), "cell", "exec"), namespace)
        return None
    exec(compile(ast.Module(body, []), "cell", "exec"), namespace)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), namespace)


def test_the_notebook_runs(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every cell of the notebook runs in order against a service, its edits, traces and evaluations are shown as HTML,
    and the model is in the end what it was."""
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    monkeypatch.setenv("PALIMPSEST_URL", url)
    namespace: dict[str, object] = {}
    shown: list[str] = []
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "a stored notebook has no outputs"
        if cell["cell_type"] == "code":
            value = run_cell("".join(cell["source"]), namespace)
            if value is not None:
                shown.append(value._repr_html_())
    assert len(shown) == 4 and all(page.count("<table") for page in shown)
    assert shown[1].count("MLPs") == 0 and "dry_run_passed" in shown[1]
    first, *_, last = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("Edit(")]
    assert first == last
