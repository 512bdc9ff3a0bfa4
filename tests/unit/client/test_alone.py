"""The client as a separate distribution: its imports and dependencies."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

from tests.support.paths import ROOT

OTHERS = ["service", "api", "workers", "cli", "migrations", "pydantic", "fastapi", "sqlalchemy", "redis", "rich", "numpy"]  # fmt: skip
OTHERS += ["safetensors", "tokenizers", "torch", "transformers", "matplotlib"]


def test_client_imports_without_the_service() -> None:
    """The client imports in an interpreter in which the service and its dependencies cannot be imported."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({OTHERS}))\nimport palimpsest; palimpsest.Client()"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_client_wheel_contains_only_the_client(tmp_path: Path) -> None:
    """The wheel contains the modules of this package and its type marker, and requires httpx and httpx-sse."""
    [path] = WheelBuilder(str(ROOT / "palimpsest")).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as wheel:
        installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
        [metadata] = [name for name in wheel.namelist() if name.endswith("METADATA")]
        needs = [
            line for line in wheel.read(metadata).decode().splitlines() if line.startswith("Requires-Dist")
        ]
    ours = [*(ROOT / "palimpsest").glob("*.py"), ROOT / "palimpsest" / "py.typed"]
    assert installed == {str(one.relative_to(ROOT)) for one in ours}
    assert needs == ["Requires-Dist: httpx", "Requires-Dist: httpx-sse"]


def test_client_and_service_are_of_one_version() -> None:
    """Both distributions have the same version and Python requirement."""
    whole, alone = (tomllib.loads((ROOT / p).read_text())["project"] for p in ("pyproject.toml", "palimpsest/pyproject.toml"))  # fmt: skip
    assert whole["version"] == alone["version"] and whole["requires-python"] == alone["requires-python"]
