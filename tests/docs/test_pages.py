"""The blocks of every documentation page are executed in order, on a real service with the shipped GPT."""

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
    DATA_LANGUAGES,
    EXAMPLES_PAGE,
    FRESH_SERVICE,
    PLAIN_LANGUAGES,
    PYTHON_LANGUAGES,
    QUICK_EDITS,
    SHELL_LANGUAGES,
    Block,
    doc_pages,
    page_text,
    read_blocks,
    runnable_with_output,
)
from tests.support.page_output import output_matches
from tests.support.page_sessions import DocSession
from tests.support.processes import EmbeddedService
from tests.support.shipped_service import copy_statistics, model_of_quick_edits, wait_for_statistics

DATA_PARSERS: dict[str, Callable[[str], object]] = {
    "json": json.loads,
    "yaml": yaml.compose,  # accepts any tag, including those of the Compose specification
    "toml": tomllib.loads,
    "ini": lambda text: configparser.ConfigParser().read_string(text),
}


@pytest.fixture(scope="module")
def shared_service(
    statistics_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddedService]:
    """Yield one service that all pages share."""
    service = EmbeddedService(copy_statistics(statistics_folder, tmp_path_factory.mktemp("service")))
    wait_for_statistics(service)
    yield service
    service.stop()


@contextmanager
def service_for_page(page: str, shared_service: EmbeddedService, folder: Path) -> Iterator[EmbeddedService]:
    """Yield a service at version 0 of the shared ledger, or a new service if the page shows version numbers."""
    text = page_text(page)
    if FRESH_SERVICE in text or QUICK_EDITS in text:
        data = copy_statistics(shared_service.data / "statistics", folder / "data")
        model = model_of_quick_edits(folder) if QUICK_EDITS in text else None
        service = EmbeddedService(data, model=model)
        try:
            wait_for_statistics(service)
            yield service
        finally:
            service.stop()
        return
    try:
        yield shared_service
    finally:
        for edit in shared_service.list_all("/edits"):
            if edit["status"] in ("applied", "queued", "running"):
                shared_service.revert(edit)


RUNNABLE_PAGES = [
    page for page in doc_pages() if any(block.runs for block in read_blocks(page)) and page != EXAMPLES_PAGE
]


@pytest.mark.parametrize("page", RUNNABLE_PAGES)
def test_page_blocks_run(page: str, shared_service: EmbeddedService, tmp_path: Path) -> None:
    """Every shell and Python block of a page succeeds, in order, and prints the output that the page shows."""
    with service_for_page(page, shared_service, tmp_path / "service") as service:
        address = str(service.http.base_url).rstrip("/")
        data = tmp_path / "data"
        data.mkdir()
        (data / "statistics").symlink_to(shared_service.data / "statistics")  # the same model
        environment = {
            "PALIMPSEST_URL": address,
            "PALIMPSEST_DATA_DIR": str(data),
            "SERVICE_DATA": str(service.data),
        }
        with DocSession(tmp_path / "session", environment, service.http.base_url.port or 0) as session:
            for block, output in runnable_with_output(read_blocks(page)):
                actual = session.run(block)
                if output is not None:
                    assert output_matches(output.code, actual, output.language), mismatch_message(
                        output, actual
                    )


def mismatch_message(output: Block, actual: str) -> str:
    return f"{output}: the page shows\n{output.code}\nand the command printed:\n{actual}"


def all_blocks() -> list[Block]:
    return [block for page in doc_pages() for block in read_blocks(page)]


def is_accounted_for(block: Block) -> bool:
    """Return whether a block is executed, compared, parsed, plain text, or excluded with a reason."""
    if block.language in PLAIN_LANGUAGES:
        return True
    if block.is_output:
        return block.language in ("json", *DATA_LANGUAGES)
    if block.reason is not None:
        return bool(block.reason)
    return block.language in (*SHELL_LANGUAGES, *PYTHON_LANGUAGES, *DATA_LANGUAGES)


@pytest.mark.parametrize("block", all_blocks(), ids=str)
def test_every_block_is_executed_or_has_a_reason(block: Block) -> None:
    """Every block is executed, is compared output, is parsed data, or has a comment with a reason."""
    assert is_accounted_for(block), f"{block}: a block of {block.language!r} without a directive"


@pytest.mark.parametrize("page", doc_pages())
def test_every_output_block_is_compared(page: str) -> None:
    """Every output block directly follows a block that is executed."""
    page_blocks = read_blocks(page)
    compared = [output for _, output in runnable_with_output(page_blocks) if output is not None]
    assert [str(block) for block in page_blocks if block.is_output] == [str(block) for block in compared]


@pytest.mark.parametrize(
    "block", [b for b in all_blocks() if b.language in DATA_LANGUAGES and not b.is_output], ids=str
)
def test_data_blocks_parse(block: Block) -> None:
    """JSON, YAML, TOML, INI and SQL blocks parse."""
    if block.language == "sql":
        assert sqlite3.complete_statement(block.code)
    else:
        DATA_PARSERS[block.language](block.code)
