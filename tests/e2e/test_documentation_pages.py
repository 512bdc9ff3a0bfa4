"""Swagger UI and ReDoc in Chromium: they show every route without a request to another host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from tests.support import chromium
from tests.support.application import TestApp, serving
from tests.support.chromium import open_page, save_screenshot


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.open_browser() as browser:
        yield browser


@pytest.mark.parametrize(
    ("path", "operation"), [("docs", ".opblock"), ("redoc", "[data-section-id^='operation/']")]
)
def test_the_page_shows_every_operation(browser: Browser, tmp_path: Path, path: str, operation: str) -> None:
    """Each operation of the OpenAPI document is on the page, which logs no error."""
    test_app = TestApp(tmp_path)
    with serving(test_app) as address, open_page(browser, address) as found:
        document = httpx.get(f"{address}/openapi.json", timeout=60).json()
        count = sum(len(operations) for operations in document["paths"].values())
        found.page.goto(f"{address}/{path}")
        expect(found.page.locator(operation)).to_have_count(count)
        expect(found.page.get_by_role("heading", name="Palimpsest").first).to_be_visible()
        save_screenshot(found.page, path, full_page=False)


def test_a_request_can_be_tried(browser: Browser, tmp_path: Path) -> None:
    """Swagger UI sends a request to this service and shows its answer."""
    test_app = TestApp(tmp_path)
    with serving(test_app) as address, open_page(browser, address) as found:
        page = found.page
        page.goto(f"{address}/docs")
        page.locator("#operations-models-list_models .opblock-summary-control").click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        expect(page.locator(".live-responses-table tbody .response-col_status").first).to_contain_text("200")
