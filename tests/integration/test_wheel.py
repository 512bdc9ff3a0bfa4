"""The wheel works outside of the checkout: it has every file of its packages, and its commands run from it alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from service.settings import SHIPPED_MODEL
from tests.support.paths import ROOT

WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"][
    "targets"
]["wheel"]
#: a program that runs a command with the packages of the wheel, and fails if one of them is not of the wheel
RUN = """
import sys
import api.app, cli.main, service, workers
for package in (api.app, cli.main, service, workers):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
sys.exit(cli.main.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_wheel_has_every_file_of_its_packages(unpacked: Path) -> None:
    """Nothing of a package is missing: pages of the console, migrations, recipes, the shipped GPT."""
    folders = [SHIPPED_MODEL if name == "models" else ROOT / name for name in WHEEL["packages"]]
    files = [
        p for folder in folders for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    names = [str(p.relative_to(ROOT)) for p in files]
    left_out = {name.lstrip("/") for name in WHEEL["exclude"]}
    missing = [n for n in names if n not in left_out and not (unpacked / n).exists()]
    assert len(names) > 300 and missing == []


def test_commands_run_from_the_wheel_alone(unpacked: Path, tmp_path: Path) -> None:
    """A command that needs files of the packages runs in another folder, and creates the tables of a new database."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PALIMPSEST_")}
    environment |= {"PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", RUN, str(unpacked), "migrate", "--data-dir", str(tmp_path / "data")]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert list((tmp_path / "data").glob("*.db")) or list((tmp_path / "data").glob("*.sqlite*"))
