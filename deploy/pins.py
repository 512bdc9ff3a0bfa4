"""Write the indirect dependencies into constraints.txt: `make pins`.

    python deploy/pins.py               keep the pins that still apply, add missing ones, remove the others
    python deploy/pins.py --upgrade     take the newest versions that the direct dependencies allow

pip resolves the dependencies of the project with all its extras and installs nothing. What only a build of torch for
GPUs needs is not pinned here: such a build requires exact versions itself, and other machines must not install them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
INDIRECT_HEADING = "# Indirect dependencies, written by `make pins`.\n"
END_HEADING = "# Not installed with the project: "  #: beginning of the heading after them
#: beginnings of the names of distributions that only a build of torch for GPUs needs
GPU_PREFIXES = ("nvidia-", "cuda-", "triton")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that are allowed")
    before, indirect, after = split_constraints(CONSTRAINTS.read_text(encoding="utf-8"))
    known = before + after + ("" if parser.parse_args().upgrade else indirect)
    pins = indirect_pins(resolve(known), before + after)
    CONSTRAINTS.write_text(before + INDIRECT_HEADING + pins + after, encoding="utf-8")
    changed = len(set(pins.splitlines()) ^ set(indirect.splitlines()))
    sys.stdout.write(
        f"constraints.txt: {len(pins.splitlines())} indirect dependencies, {changed} lines changed.\n"
    )
    return 0


def split_constraints(text: str) -> tuple[str, str, str]:
    """Return the text before the indirect dependencies, their lines, and the text after them."""
    before, _, rest = text.partition(INDIRECT_HEADING)
    indirect, heading, after = rest.partition(END_HEADING)
    return before, indirect, heading + after


def resolve(constraints: str) -> dict[str, str]:
    """Return the versions of all distributions that the project with its extras needs, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ",".join(project["optional-dependencies"])
    with tempfile.TemporaryDirectory() as folder:
        file, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        file.write_text(constraints, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--constraint", str(file), "--report", str(report), "--editable", f".[{extras}]"]
        subprocess.run(command, cwd=ROOT, check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    versions = {item["metadata"]["name"]: item["metadata"]["version"].partition("+")[0] for item in found}
    return {name: version for name, version in versions.items() if normalize(name) != project["name"]}


def indirect_pins(versions: Mapping[str, str], others: str) -> str:
    """Return the lines of the distributions that have no pin in `others`, sorted by name."""
    pinned = {normalize(line.partition("==")[0]) for line in others.splitlines()}
    names = [
        name
        for name in versions
        if normalize(name) not in pinned and not normalize(name).startswith(GPU_PREFIXES)
    ]
    return "".join(f"{name}=={versions[name]}\n" for name in sorted(names, key=normalize))


def normalize(name: str) -> str:
    """Return the name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
