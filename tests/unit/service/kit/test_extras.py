"""How to install the packages of an extra."""

from __future__ import annotations

from pathlib import Path

from service.kit.extras import install_command


def test_a_checkout_installs_itself_with_its_pins(tmp_path: Path) -> None:
    """Beside pyproject.toml and constraints.txt the command installs the checkout; without them, as in a wheel, the
    distribution."""
    assert install_command("worker", tmp_path) == "pip install 'palimpsest[worker]'"
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    assert install_command("worker", tmp_path) == "pip install -c constraints.txt -e '.[worker]'"
