"""The documentation agrees with the code: settings, routes, commands, scripts."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
from pydantic_settings import BaseSettings

from cli.client import ClientSettings
from cli.flags import default_text, flag_fields, flag_name, variable_name
from cli.main import build_parser
from service.settings import Settings
from tests.support.generated_pages import load_page_program
from tests.support.page_blocks import doc_pages
from tests.support.paths import ROOT

ROW = re.compile(r"^\| `(--[\w-]+)` \| `(\w+)` \| (.+?) \| (.+?) \|$", re.MULTILINE)
ROUTE = re.compile(r"^### `(GET|POST|PUT|PATCH|DELETE) (/\S+)`$", re.MULTILINE)


def read_page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def shell_commands(name: str) -> Iterator[str]:
    """Yield the commands in the shell blocks of a page, with continuation lines and quoted newlines joined."""
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", read_page(name), re.MULTILINE | re.DOTALL):
        command = ""
        for line in block.replace("\\\n", " ").splitlines():
            command += ("\n" if command else "") + line.removeprefix("$ ")
            try:
                shlex.split(command, comments=True)
            except ValueError:  # a quote is open
                continue
            yield command
            command = ""
        assert not command, f"{name} has a block whose quotes do not close: {command}"


def documented_settings() -> list[tuple[str, ...]]:
    return ROW.findall(read_page("docs/settings.md"))


def settings_rows(settings: type[BaseSettings]) -> list[tuple[str, ...]]:
    table_rows: list[tuple[str, ...]] = []
    for name in flag_fields(settings):  # not those of tests
        field = settings.model_fields[name]
        value = default_text(settings, name)
        shown = f"`{value}`" if value else "none"
        table_rows.append((flag_name(name), variable_name(settings, name), shown, str(field.description)))
    return table_rows


def test_settings_are_documented() -> None:
    """docs/settings.md has exactly the settings of the service and the clients, with defaults and descriptions."""
    assert documented_settings() == [*settings_rows(Settings), *settings_rows(ClientSettings)]


def test_routes_are_documented() -> None:
    """docs/api.md has a section for every route of the application, and no other section."""
    from api.app import create_app

    unused: Any = Mock()  # no route is called
    app = create_app(unused, unused, Settings(api_key=None))
    served = {
        (method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods
    }
    assert set(ROUTE.findall(read_page("docs/api.md"))) == served


def test_reference_is_up_to_date() -> None:
    """docs/reference.md equals the output of docs/reference.py for the OpenAPI document of this code."""
    reference = load_page_program("reference")
    assert read_page("docs/reference.md") == reference.render(reference.document()), (
        "run: python docs/reference.py"
    )


@pytest.mark.parametrize("page", ["docs/api.md"])
def test_request_bodies_are_json(page: str) -> None:
    """The request bodies of the curl examples are valid JSON."""
    bodies = [
        words[words.index("-d") + 1] for words in map(shlex.split, shell_commands(page)) if "-d" in words
    ]
    assert bodies
    for body in bodies:
        assert json.loads(body)


def known_options(words: list[str]) -> set[str]:
    """Return the options of the command that these words start with, including those of its subcommand."""
    parser, options = build_parser(), set[str]()
    for word in words:
        verbs = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not verbs or word.startswith("-"):
            break
        parser = verbs[0][word]
        options |= {option for action in parser._actions for option in action.option_strings}
    return options


@pytest.mark.parametrize("page", doc_pages())
def test_commands_exist(page: str) -> None:
    """Every `palimpsest` and `make` command in the documentation exists and accepts its options."""
    targets = set(re.findall(r"^(?:# make )?([\w-]+)(?=:| )", read_page("Makefile"), re.MULTILINE))
    for command in shell_commands(page):
        words = shlex.split(command, comments=True)
        if words[:1] == ["palimpsest"] and len(words) > 1 and not words[1].startswith("-"):
            assert {word.split("=")[0] for word in words[2:] if word.startswith("--")} <= known_options(
                words[1:]
            ), command
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if re.fullmatch(r"[\w-]+", word)} <= targets, command


SCRIPT = re.compile(r"python ((?:bench|training|docs|examples)/[\w/]+\.py)((?:(?!python )[^`\n])*)")


@pytest.mark.parametrize("page", doc_pages())
def test_scripts_exist(page: str) -> None:
    """Every script that a page names exists and defines the options that it is given."""
    for script, arguments in SCRIPT.findall(" ".join(read_page(page).split())):
        assert (ROOT / script).is_file(), script
        sources = "".join(
            read_page(str(path.relative_to(ROOT))) for path in [ROOT / script, *(ROOT / "bench").glob("*.py")]
        )
        for option in set(re.findall(r"(?<=\s)--[a-z][\w-]*", arguments)) - {"--help"}:
            assert f'"{option}"' in sources, f"{script} {option}"
