"""Look up the pinned versions in a database of known vulnerabilities: `make audit`.

    python deploy/audit.py PATH_OF_PIP_AUDIT

Exit code 0: no known vulnerability. 1: at least one, which is listed. 2: none among those that were looked up, and some
or all could not be looked up, for example because the database cannot be reached.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"

NOTHING_AUDITED = "Nothing was audited: run this where the database of known vulnerabilities can be reached."


def main(pip_audit: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [pip_audit, "--requirement", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
        command += ["--progress-spinner", "off", "--format", "json", "--output", str(report)]
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
        if not report.exists() or completed.returncode not in (0, 1):
            reason = (completed.stderr.strip().splitlines() or ["pip-audit gave no reason"])[-1]
            sys.stderr.write(f"{NOTHING_AUDITED}\n{reason}\n")
            return 2
        return summarize(json.loads(report.read_text(encoding="utf-8"))["dependencies"])


def summarize(dependencies: list[dict[str, Any]]) -> int:
    """Print the vulnerabilities and what was skipped. Return the exit code."""
    skipped = [d for d in dependencies if "skip_reason" in d]
    looked_up = [d for d in dependencies if "skip_reason" not in d]
    vulnerable = [d for d in looked_up if d["vulns"]]
    for d in vulnerable:
        for found in d["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "no version yet"
            sys.stdout.write(f"{d['name']} {d['version']}: {found['id']}, fixed in {fixed}\n")
    if skipped:
        sys.stderr.write(
            f"{len(skipped)} versions could not be looked up. The first: {skipped[0]['skip_reason']}.\n"
        )
    if not looked_up:
        sys.stderr.write(f"{NOTHING_AUDITED}\n")
        return 2
    sys.stdout.write(
        f"{len(looked_up)} versions were looked up; {len(vulnerable)} have known vulnerabilities.\n"
    )
    return 1 if vulnerable else 2 if skipped else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
