"""Known vulnerabilities of the pinned versions: deploy/audit.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy.audit import main

SOUND: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
VULNERABLE = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
SKIPPED = {"name": "c", "skip_reason": "not found"}


def fake_pip_audit(folder: Path, dependencies: list[dict[str, Any]] | None, code: int) -> str:
    """Return a program that reports these dependencies and exits with a code; None: it reports nothing."""
    report = "" if dependencies is None else json.dumps({"dependencies": dependencies})
    program = folder / "pip-audit"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nreport = {report!r}\n"
        "if report: open(sys.argv[sys.argv.index('--output') + 1], 'w').write(report)\n"
        "assert '--no-deps' in sys.argv and 'constraints.txt' in str(sys.argv)\n"
        f"sys.stderr.write('cannot connect\\n')\nsys.exit({code})\n"
    )
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("dependencies", "code", "expected", "text"),
    [
        ([SOUND], 0, 0, "1 versions were looked up; 0 have known vulnerabilities"),
        ([SOUND, VULNERABLE], 1, 1, "b 2: CVE-1, fixed in 3"),
        ([VULNERABLE, SKIPPED], 1, 1, "1 versions could not be looked up. The first: not found."),
        ([SOUND, SKIPPED], 0, 2, "1 versions could not be looked up"),
        ([SKIPPED, SKIPPED], 0, 2, "Nothing was audited"),
        (
            None,
            1,
            2,
            "Nothing was audited: run this where the database of known vulnerabilities can be reached.\ncannot",
        ),
    ],
)
def test_exit_codes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dependencies: list[dict[str, Any]] | None,
    code: int,
    expected: int,
    text: str,
) -> None:
    """Only a complete look-up without a finding is a success; an unreachable database is told from a finding."""
    assert main(fake_pip_audit(tmp_path, dependencies, code)) == expected
    assert text in "".join(capsys.readouterr())
