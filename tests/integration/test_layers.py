"""The API process imports neither torch nor transformers at run time."""

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
    """Importing the module and its dependencies does not import torch or transformers."""
    script = f"import sys, {module}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
