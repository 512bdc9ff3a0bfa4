"""Dependencies are pinned, and the tests run with the pinned versions."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.pins import GPU_PREFIXES
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CLIENT = tomllib.loads((ROOT / "palimpsest" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


#: pins of what is not installed with the project: build dependencies and tools
NOT_INSTALLED = ["editables", "pip-audit"]


def direct_requirements() -> list[Requirement]:
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    requirements = [
        Requirement(text) for text in [*PROJECT["dependencies"], *extras, *CLIENT["dependencies"]]
    ]
    return [one for one in requirements if one.name != PROJECT["name"]]


def is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def needed_distributions() -> set[str]:
    """Return the names of the distributions that the project needs here with all extras but `corpora`, which is not
    installed."""
    left_out = set(PROJECT["optional-dependencies"]["corpora"])
    waiting = [one for one in direct_requirements() if one.name not in left_out]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen and not name.startswith(GPU_PREFIXES):
                seen.add((name, extra))
                waiting += applying(requires(name) or (), extra)
    return {name for name, _ in seen}


def applying(texts: Iterable[str], extra: str) -> Iterator[Requirement]:
    """Yield the requirements that apply on this machine with an extra."""
    for requirement in map(Requirement, texts):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def test_versions_are_pinned_in_one_place() -> None:
    """Each pyproject.toml lists dependencies without versions, and constraints.txt pins all of them."""
    assert not [str(one) for one in direct_requirements() if one.specifier]
    pinned = {canonicalize_name(Requirement(line).name) for line in PINS}
    assert {canonicalize_name(one.name) for one in direct_requirements()} <= pinned


def test_a_pin_is_a_plain_version() -> None:
    """A pin has no local version and no URL, and torch is the first pin."""
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9]+(\.[0-9]+)*(\.post[0-9]+)?", line) for line in PINS)
    assert PINS[0].startswith("torch==")


def test_everything_that_is_needed_is_pinned_once() -> None:
    """Every distribution that the project needs, directly or indirectly, has exactly one pin."""
    pinned = [canonicalize_name(Requirement(line).name) for line in PINS]
    assert len(set(pinned)) == len(pinned)
    assert sorted(needed_distributions() - set(pinned)) == [], "run make pins"


def test_the_pins_are_what_is_installed() -> None:
    """The installed versions are the pinned ones. A pin that is not installed belongs to the extra `corpora`, to the
    build or to a tool with an environment of its own; nothing that is needed is missing."""
    needed = needed_distributions()
    for line in PINS:
        name, pinned = line.split("==")
        if is_installed(name):
            assert version(name).partition("+")[0] == pinned, f"{name}: run make install"
        else:
            assert canonicalize_name(name) not in needed, f"{name}: run make install"


def test_the_walk_reaches_indirect_dependencies() -> None:
    """The walk follows extras and markers: it finds what only an indirect dependency or an extra needs, and nothing
    that this machine does not need."""
    needed = needed_distributions()
    assert {"pydantic-core", "starlette", "sympy", "psycopg-binary", "h11"} <= needed
    assert not {"pytest-cov", "optree", *NOT_INSTALLED} & needed


def test_distributions_of_one_kind_of_machine_are_not_pinned() -> None:
    """No pin forces a distribution that only a build of torch for GPUs needs."""
    assert not [line for line in PINS if canonicalize_name(line).startswith(GPU_PREFIXES)]


@pytest.mark.parametrize("name", NOT_INSTALLED)
def test_tools_are_pinned(name: str) -> None:
    """What is used and not installed with the project is pinned too."""
    assert [line for line in PINS if line.startswith(f"{name}==")]


def test_every_installation_is_constrained() -> None:
    """Every `pip install` and `pip wheel` of the Makefile and the Dockerfile uses the pins. Where the project is built,
    they apply to build dependencies too."""
    for file in ("Makefile", "Dockerfile"):
        text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [line for line in text.splitlines() if re.search(r"\bpip\S* .*\b(install|wheel) ", line)]
        assert lines, file
        for line in lines:
            is_build = re.search(r"-e |pip wheel", line)
            constrained = "PIP_BUILD_CONSTRAINT=" in line or "$(CONSTRAINED)" in line
            assert constrained if is_build else "-c constraints.txt" in line or "/dist/*.whl" in line, line
