"""Whoever follows a page gets what it shows: every block is run in order, on a real service with the shipped GPT."""

from __future__ import annotations

import configparser
import json
import sqlite3
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.support.page_blocks import (
    FORMS,
    FRESH,
    PLAIN,
    PYTHON,
    SHELL,
    Block,
    pages,
    read,
    taken_up,
    text_of,
)
from tests.support.page_output import same
from tests.support.page_sessions import Session
from tests.support.processes import Service

FORM: dict[str, Callable[[str], object]] = {
    "json": json.loads,
    "yaml": yaml.compose,  # of any tags, compose's too
    "toml": tomllib.loads,
    "ini": lambda text: configparser.ConfigParser().read_string(text),
}


@pytest.fixture(scope="module")
def shared(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all pages."""
    service = Service(tmp_path_factory.mktemp("service"))
    yield service
    service.stop()


@contextmanager
def opened(page: str, shared: Service, folder: Path) -> Iterator[Service]:
    """The service that a page is followed with, and the model as it was loaded: its own where the page counts versions."""
    if FRESH in text_of(page):
        (folder / "statistics").mkdir(parents=True)
        for made in (shared.data / "statistics").iterdir():
            (folder / "statistics" / made.name).symlink_to(made)
        service = Service(folder)
        yield service
        service.stop()
        return
    yield shared
    for edit in shared.pages("/edits"):
        if edit["status"] in ("applied", "queued", "running"):
            shared.revert(edit)


FOLLOWED = [page for page in pages() if any(block.runs for block in read(page))]


@pytest.mark.parametrize("page", FOLLOWED)
def test_a_page_can_be_followed(page: str, shared: Service, tmp_path: Path) -> None:
    """Every command and every program of a page works, in its order, and prints what the page says."""
    with opened(page, shared, tmp_path / "service") as service:
        address = str(service.http.base_url).rstrip("/")
        data = tmp_path / "data"
        data.mkdir()
        (data / "statistics").symlink_to(shared.data / "statistics")  # of the same model
        environment = {
            "PALIMPSEST_URL": address,
            "PALIMPSEST_DATA": str(data),
            "SERVICE_DATA": str(service.data),
        }
        with Session(tmp_path / "followed", environment, service.http.base_url.port or 0) as session:
            for block, output in taken_up(read(page)):
                came = session.run(block)
                if output is not None:
                    assert same(output.code, came, output.language), but(output, came)


def but(output: Block, came: str) -> str:
    return f"{output}: the page shows\n{output.code}\nand this came:\n{came}"


def every() -> list[Block]:
    return [block for page in pages() for block in read(page)]


def told(block: Block) -> bool:
    """Whether somebody has said what is to be done with a block."""
    if block.language in PLAIN:
        return True
    if block.is_output:
        return block.language in ("json", *FORMS)
    if block.reason is not None:
        return bool(block.reason)
    return block.language in (*SHELL, *PYTHON, *FORMS)


@pytest.mark.parametrize("block", every(), ids=str)
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    """Every block is run, is the output of one, has the form that it claims, or gives a reason; a block of a language nobody knows is none of these."""
    assert told(block), f"{block}: a block of {block.language!r} that nothing is said of"


@pytest.mark.parametrize("page", pages())
def test_an_output_follows_what_printed_it(page: str) -> None:
    """What is shown as output stands right after a block that was run: nothing is shown that was not compared."""
    found = read(page)
    compared = [output for _, output in taken_up(found) if output is not None]
    assert [str(block) for block in found if block.is_output] == [str(block) for block in compared]


@pytest.mark.parametrize("block", [b for b in every() if b.language in FORMS and not b.is_output], ids=str)
def test_a_form_is_well_formed(block: Block) -> None:
    """What is shown as JSON, YAML, TOML, INI or SQL can be read as that."""
    if block.language == "sql":
        assert sqlite3.complete_statement(block.code)
    else:
        FORM[block.language](block.code)
