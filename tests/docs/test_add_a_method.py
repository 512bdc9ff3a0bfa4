"""The worked example of docs/contributing/add-an-editing-method.md: one module and one line make a method available."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "contributing" / "add-an-editing-method.md"
PACKAGES = ("api", "cli", "migrations", "palimpsest", "service", "workers", "tests/support")

CHECKS = """
import contextlib, io, sys, tempfile
from pathlib import Path

from api.app import create_app
from service.methods.registry import METHODS

assert "torch" not in sys.modules, "the registry imports torch"
assert "rome-identity" in METHODS

from fastapi.testclient import TestClient
from tests.support.application import TestApp

app = TestApp(Path(tempfile.mkdtemp()))
with TestClient(app.app) as client:
    openapi = client.get("/openapi.json").text
    assert '"rome-identity"' in openapi, "not in OpenAPI"
    (model,) = client.get("/models").json()["items"]
    assert "rome-identity" in [method["name"] for method in model["methods"]], "not in GET /models"
app.close()

from cli.main import main
shown = io.StringIO()
with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
    main(["evaluate", "--help"])
assert "rome-identity" in shown.getvalue(), "not in the help of the command line"

import torch
from service.covariance.second_moment import KeyStatistics
from service.editing.find_factors import find_factors
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.recipes.recipe import resolve_hparams
from service.weights.composition import compose
from service.weights.factors import deserialize_updates, serialize_updates
from tests.support.tiny_models import tiny

gpt = tiny()
parameters = resolve_hparams(None, {"layers": [1], "steps": 2, "contexts": 0}, gpt.num_layers, "rome-identity")
statistics = {1: KeyStatistics(1, torch.eye(gpt.intermediate_size, dtype=torch.float64) * 2, 1, 0.0, "")}
statement = fill_prompt("The {} is located in the city of", "Eiffel Tower")
factors = run_to_completion(
    find_factors(gpt, statistics, [], statement, "Rome", parameters, "edit", "rome-identity")
)
(update,) = factors.updates
assert torch.equal(update.direction, update.key.float()), "the direction is not the key"
(restored,) = deserialize_updates(serialize_updates([update]), "edit", update.subject)
assert restored.solve_mode.name == "rome-identity" and compose([restored])
"""


def test_a_method_is_one_module_and_one_line(tmp_path: Path) -> None:
    """The method of the page is in OpenAPI, GET /models and the command line's help, and computes an edit."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    module, line = re.findall(r"```(?:python|text)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "service" / "methods" / "rome_identity.py").write_text(module, encoding="utf-8")
    registry = tmp_path / "service" / "methods" / "registry.py"
    text = registry.read_text(encoding="utf-8")
    assert line.count("\n") == 1 and '    "finetune",\n' in text
    registry.write_text(text.replace('    "finetune",\n', f'    "finetune",\n{line}'), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    finished = subprocess.run(
        [sys.executable, "-c", CHECKS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if finished.returncode:
        pytest.fail(finished.stderr[-3000:])
