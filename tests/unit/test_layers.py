"""What is promised about imports holds when the program runs, too."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "api.app",
        "cli.main",
        "cli.serve",
        "cli.study",
        "service.bootstrap",
        "service.application",
        "service.jobs.job_store",
        "service.ledger.verify",
    ],
)
def test_the_api_process_never_imports_torch(module: str) -> None:
    """Importing the doors and all that they need leaves torch and transformers out of the process."""
    script = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
