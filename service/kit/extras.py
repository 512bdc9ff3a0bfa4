"""How to install the packages of an extra: in a checkout with its pins, elsewhere for the installed wheel."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def install_command(extra: str, root: Path = _ROOT) -> str:
    """Return the command that installs an extra. `root` is the folder that has the packages of the project."""
    if (root / "pyproject.toml").is_file() and (root / "constraints.txt").is_file():
        return f"pip install -c constraints.txt -e '.[{extra}]'"
    return f"pip install 'palimpsest[{extra}]'"
