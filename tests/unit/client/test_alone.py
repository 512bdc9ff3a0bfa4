"""The client stands alone: what it imports, and what is installed with it."""

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
    """In a fresh interpreter in which no package of the service and none of its dependencies can be imported, the client can."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({OTHERS}))\nimport palimpsest; palimpsest.Client()"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_client_wheel_contains_only_the_client(tmp_path: Path) -> None:
    """What is installed for a client are the modules of this package and their types, and httpx."""
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
    """Both distributions come from one commit and say so."""
    whole, alone = (tomllib.loads((ROOT / p).read_text())["project"] for p in ("pyproject.toml", "palimpsest/pyproject.toml"))  # fmt: skip
    assert whole["version"] == alone["version"] and whole["requires-python"] == alone["requires-python"]
