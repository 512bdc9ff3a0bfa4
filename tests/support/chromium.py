"""The installed Chromium for tests, with page sessions that record console errors and requests to other hosts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.paths import ROOT

#: flags that disable requests for updates and to other services
CHROMIUM_FLAGS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
    "--no-sandbox",  # the sandbox does not run as root
]
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
TIMEOUT_MS = 60_000  # milliseconds
expect.set_options(timeout=TIMEOUT_MS)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start a browser. While it runs, this thread cannot run asyncio."""
    program = _chromium_path()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


def _chromium_path() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        reason = "Chromium is not installed: install the Debian package `chromium`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@dataclass
class PageSession:
    """A page with its console errors and its requests to other hosts."""

    page: Page
    address: str
    console_errors: list[str] = field(default_factory=list)
    foreign_requests: list[str] = field(default_factory=list)

    def open(self, fragment: str) -> Page:
        """Open a page of the console by its URL fragment."""
        self.page.goto(f"{self.address}/#/{fragment}")
        return self.page

    def accessibility_violations(self) -> list[str]:
        """Return the serious and critical violations that axe finds on the page."""
        violations = Axe().run(self.page).response["violations"]
        return [
            f"{violation['id']}: {violation['help']} at {[node['target'] for node in violation['nodes']][:5]}"
            for violation in violations
            if violation["impact"] in ("serious", "critical")
        ]


@contextmanager
def open_page(browser: Browser, address: str, allowed: str = "", **context: Any) -> Iterator[PageSession]:
    """Open a page in its own context; on exit, assert no console error without `allowed` and no foreign request."""
    browser_context = browser.new_context(**({"color_scheme": "light"} | DESKTOP | context))
    page = browser_context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    session = PageSession(page, address)
    page.on("console", lambda said: session.console_errors.append(said.text) if said.type != "log" else None)
    page.on("pageerror", lambda error: session.console_errors.append(str(error)))
    page.on(
        "request",
        lambda asked: session.foreign_requests.append(asked.url) if _is_foreign(asked.url, address) else None,
    )
    yield session
    browser_context.close()
    unexpected_errors = [said for said in session.console_errors if not allowed or allowed not in said]
    assert (unexpected_errors, session.foreign_requests) == ([], [])


def _is_foreign(url: str, address: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme not in ("blob", "data") and parts.netloc != urlsplit(address).netloc


def save_screenshot(page: Page, name: str, folder: Path | None = None, full_page: bool = True) -> None:
    """Save a screenshot to the folder of PALIMPSEST_SCREENSHOTS, or to runs/console."""
    target = folder or Path(os.environ.get("PALIMPSEST_SCREENSHOTS") or ROOT / "runs" / "console")
    page.screenshot(path=target / f"{name}.png", full_page=full_page, animations="disabled")
