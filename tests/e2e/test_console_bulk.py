"""Many edits in the console: a table that is checked and applied as a batch, the list with search and reverts, names of
versions and what differs between two."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from tests.support import chromium
from tests.support.application import TestApp, serving
from tests.support.chromium import PHONE, open_page, save_screenshot

TABLE = (
    "subject;prompt;target_new\nEiffel Tower;The {} is in;Rome\nNile;The {} is;long\nLouvre;It is in;Bonn\n"
)
BATCH = "corrections-2026-11"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.open_browser() as browser:
        yield browser


def test_a_table_becomes_a_batch_and_is_reverted(browser: Browser, tmp_path: Path) -> None:
    """A table is checked line by line with what the model says, applied as a batch with a name, found by a search,
    named as a version, and reverted together; the pages are accessible and fit a phone."""
    test_app = TestApp(tmp_path)
    test_app.start_fake_worker()
    with serving(test_app) as address:
        with open_page(browser, address) as found:
            page = found.open("edits/table")
            page.get_by_label("Table as CSV").fill(TABLE)
            page.get_by_role("button", name="Check").click()
            expect(page.get_by_role("heading", name="2 of 3 lines can be edits")).to_be_visible()
            expect(page.locator(".checked .bad")).to_contain_text("does not mention the subject")
            expect(page.locator(".says")).to_have_text(["Paris", "Paris"])
            expect(page.get_by_role("button", name="Apply 2 edits")).to_be_disabled()
            assert found.accessibility_violations() == []
            save_screenshot(page, "table")
            page.get_by_label("Table as CSV").fill(TABLE.replace("It is in", "The {} is in"))
            page.get_by_label("Batch").fill(BATCH)
            page.get_by_role("button", name="Check").click()
            page.get_by_role("button", name="Apply 3 edits").click()
            expect(page.locator(".notice.good")).to_contain_text("3 of 3 edits applied.")

            page = found.open("ledger/names")
            page.get_by_label("Name", exact=True).fill("after-corrections")
            page.get_by_role("button", name="Give name").click()
            expect(page.locator(".named")).to_contain_text("after-corrections is version 3")
            assert found.accessibility_violations() == []

            page = found.open("ledger/edits")
            page.get_by_label("Search").fill("eiffel ROME")
            page.get_by_role("button", name="Search").click()
            expect(page.locator(".picked li")).to_have_count(1)
            page.locator(".batch").click()
            expect(page.locator(".picked li")).to_have_count(3)
            page.get_by_label("Select Nile").check()
            page.get_by_label("Select Louvre").check()
            assert found.accessibility_violations() == []
            save_screenshot(page, "edit-list")
            with page.expect_download() as downloaded:
                page.get_by_role("button", name="Download CSV").click()
            rows = list(csv.DictReader(io.StringIO(downloaded.value.path().read_text(), newline="")))
            assert [row["batch"] for row in rows] == [BATCH] * 3
            page.get_by_role("button", name="Revert selected").click()
            page.get_by_role("button", name="Revert", exact=True).click()
            expect(page.locator(".notice")).to_contain_text("2 edits reverted: the newest version is 5.")
            page.get_by_role("button", name="Revert the batch").click()
            page.get_by_role("button", name="Revert", exact=True).click()
            expect(page.locator(".notice")).to_contain_text("1 edit reverted, 2 had nothing to revert")
            page = found.open("ledger")
            expect(page.locator(".entry .batch")).to_contain_text(["after-corrections"])
            save_screenshot(page, "ledger-history")
        with open_page(browser, address, **PHONE | {"color_scheme": "dark"}) as found:
            page = found.open("ledger/diff?before=after-corrections&after=head")
            expect(page.locator(".changes .pill")).to_have_text(["– removed"] * 3)
            expect(page.locator(".changes del")).to_have_text(["long", "Bonn", "Rome"])
            assert found.accessibility_violations() == []
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
            save_screenshot(page, "difference-phone-dark")
            page = found.open("ledger/edits?batch=" + BATCH)
            expect(page.locator(".picked li")).to_have_count(3)
            assert found.accessibility_violations() == []
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
            save_screenshot(page, "edit-list-phone-dark")
            page = found.open("generate?version=after-corrections&prompt=The Nile is")
            expect(page.locator(".said")).to_have_text(" Paris")
        edits = httpx.get(f"{address}/edits", timeout=60).json()["items"]
    assert {(edit["status"], edit["batch"]) for edit in edits} == {("reverted", BATCH)}
    assert test_app.worker is not None and test_app.worker.calls[-1]["version"] == 3
