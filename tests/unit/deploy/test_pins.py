"""The indirect pins of constraints.txt: deploy/pins.py."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploy import pins

TEXT = (
    "# Heading.\ntorch==2.0\n# Direct dependencies.\nhttpx==1.0\n"
    + pins.INDIRECT_HEADING
    + "h11==0.1\nold==1\n"
    + pins.END_HEADING
    + "tools.\ntool==3\n"
)


def test_the_parts_of_the_file_add_up() -> None:
    """The file is split at its headings and loses nothing; without headings everything is kept."""
    before, indirect, after = pins.split_constraints(TEXT)
    assert before + pins.INDIRECT_HEADING + indirect + after == TEXT
    assert indirect == "h11==0.1\nold==1\n"
    assert pins.split_constraints("a==1\n") == ("a==1\n", "", "")


def test_indirect_pins_are_what_has_no_pin() -> None:
    """Direct dependencies and tools get no second pin, and packages of GPUs get none. Names compare as in an
    index."""
    versions = {
        "torch": "2.0",
        "HTTPX": "1.0",
        "Jinja2": "3",
        "h11": "0.2",
        "nvidia-cublas-cu12": "12",
        "triton": "3",
    }
    assert pins.indirect_pins(versions, "httpx==1.0\ntorch==2.0\n") == "h11==0.2\nJinja2==3\n"


@pytest.mark.parametrize(("arguments", "known"), [([], "h11==0.1"), (["--upgrade"], None)])
def test_make_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], known: str | None
) -> None:
    """The file gets the versions that pip resolves, without local parts. Present pins are kept unless `--upgrade` is
    given; what is no longer needed is removed."""
    file = tmp_path / "constraints.txt"
    file.write_text(TEXT)
    given: list[str] = []

    def resolve(command: list[str], **_: Any) -> None:
        given.append(Path(command[command.index("--constraint") + 1]).read_text())
        found = {"torch": "2.0+cpu", "httpx": "1.0", "h11": "0.2+local", "palimpsest": "0.1"}
        items = [{"metadata": {"name": name, "version": version}} for name, version in found.items()]
        Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": items}))

    monkeypatch.setattr(subprocess, "run", resolve)
    monkeypatch.setattr(pins, "CONSTRAINTS", file)
    monkeypatch.setattr("sys.argv", ["pins.py", *arguments])
    assert pins.main() == 0
    assert file.read_text() == TEXT.replace("h11==0.1\nold==1\n", "h11==0.2\n")
    assert "httpx==1.0" in given[0] and ("h11==0.1" in given[0]) == (known is not None)
