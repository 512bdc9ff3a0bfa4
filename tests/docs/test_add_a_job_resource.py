"""The worked example of docs/contributing/add-a-job-resource.md: three files add a kind of job with its routes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "contributing" / "add-a-job-resource.md"
PACKAGES = ("api", "cli", "migrations", "palimpsest", "service", "workers", "tests/support")

CHECKS = """
import tempfile
from pathlib import Path

from fastapi.testclient import TestClient

from api.app import create_app
from service.application.development import Development
from service.kit.steps import run_to_completion
from service.settings import Settings
from tests.support.reporters import RaisingReporter
from tests.support.application import LOOPBACK_NAMES
from tests.support.stepped_service import SteppedService
from workers.job_handlers import job_handlers

service = SteppedService(Path(tempfile.mkdtemp()))
app = create_app(service.services, service.container.broker, Settings(api_key=None), Development.ON)
with TestClient(app) as client:
    assert "/perplexities/{id}/events" in client.get("/openapi.json").json()["paths"]
    assert client.post("/perplexities", json={"texts": []}).status_code == 422
    created = client.post("/perplexities", json={"texts": ["The Eiffel Tower is in Paris."]})
    assert created.status_code == 202, created.text
    job = service.worker_parts.jobs.claim(created.json()["id"])
    handlers = job_handlers(service.replica, service.worker_parts.jobs, service.context)
    run_to_completion(handlers["perplexity"](RaisingReporter(), job))
    done = client.get(created.headers["Location"]).json()
    assert done["status"] == "done" and done["result"]["perplexity"] > 1, done
    assert [item["id"] for item in client.get("/perplexities").json()["items"]] == [done["id"]]
"""


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_job_resource_is_three_files(tmp_path: Path) -> None:
    """The request, the row and the handler of the page add routes that validate, queue, run and list a new kind of
    job."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    request, row, handler, entry = blocks()
    schemas = tmp_path / "service" / "schemas.py"
    schemas.write_text(schemas.read_text(encoding="utf-8") + "\n\n" + request, encoding="utf-8")
    end_of_jobs = "\n)\n\n#: the kinds of calls"
    new_row = "\n" + textwrap.indent(row.rstrip("\n") + ",", "    ")
    change(tmp_path / "service" / "jobs" / "job_kinds.py", end_of_jobs, new_row + end_of_jobs)
    handlers = tmp_path / "workers" / "job_handlers.py"
    end_of_handlers = "    return {kind: with_job_metrics("
    change(handlers, end_of_handlers, textwrap.indent(entry, "    ") + end_of_handlers)
    imports = "from service.models.scoring import compute_perplexity\nfrom service.schemas import PerplexityRequest\n"
    change(handlers, "from service.schemas import ", imports + "from service.schemas import ")
    handlers.write_text(handlers.read_text(encoding="utf-8") + "\n\n" + handler, encoding="utf-8")
    finished = subprocess.run(
        [sys.executable, "-c", CHECKS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if finished.returncode:
        pytest.fail(finished.stderr[-3000:])
