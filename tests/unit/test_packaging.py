"""Dependencies are pinned, and the tests run with the pinned versions."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CLIENT = tomllib.loads((ROOT / "palimpsest" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def direct_requirements() -> list[Requirement]:
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    requirements = [
        Requirement(text) for text in [*PROJECT["dependencies"], *extras, *CLIENT["dependencies"]]
    ]
    return [one for one in requirements if one.name != PROJECT["name"]]


def test_versions_are_pinned_in_one_place() -> None:
    """Each pyproject.toml lists dependencies without versions, and constraints.txt pins all of them."""
    assert not [str(one) for one in direct_requirements() if one.specifier]
    pinned = {canonicalize_name(Requirement(line).name) for line in PINS}
    assert {canonicalize_name(one.name) for one in direct_requirements()} <= pinned


def test_a_pin_is_a_plain_version() -> None:
    """A pin has no local version and no URL, and torch is the first pin."""
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9]+(\.[0-9]+)*", line) for line in PINS)
    assert PINS[0].startswith("torch==")


def test_the_pins_are_what_is_installed() -> None:
    """The installed versions are the pinned ones, except for the `corpora` extra, which is not installed."""
    left_out = set(PROJECT["optional-dependencies"]["corpora"])
    for line in PINS:
        name, pinned = line.split("==")
        if name in left_out:
            continue
        assert version(name).partition("+")[0] == pinned, f"{name}: run make install"
