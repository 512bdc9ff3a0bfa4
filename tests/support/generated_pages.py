"""The programs in docs/ that write pages."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from tests.support.paths import ROOT


def load_page_program(name: str) -> ModuleType:
    """Return the module docs/NAME.py. The folder is no package."""
    spec = importlib.util.spec_from_file_location(f"{name}_page", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
