"""Debian's Chromium for tests: the browser that is installed here, and visits that see what a page does behind its reader's back."""

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

#: it asks nobody but us: neither for updates nor for what it thinks useful
QUIET = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-sync",
    "--no-first-run",
    "--no-sandbox",  # its own sandbox is refused to root
]
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
PATIENCE = 60_000  # milliseconds after which what should have come never will
expect.set_options(timeout=PATIENCE)


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser, for as long as it is used. While it is there, asyncio cannot be run in this thread."""
    program = _program()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


def _program() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        reason = "no Chromium here: install Debian's package `chromium`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@dataclass
class Visit:
    """A page, and what it complained of and asked of other hosts."""

    page: Page
    address: str
    complaints: list[str] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def go(self, where: str) -> Page:
        """Open a page of the console, as a link would."""
        self.page.goto(f"{self.address}/#/{where}")
        return self.page

    def troubles(self) -> list[str]:
        """What axe finds serious or critical on the page as it stands."""
        found = Axe().run(self.page).response["violations"]
        return [
            f"{one['id']}: {one['help']} at {[node['target'] for node in one['nodes']][:5]}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]


@contextmanager
def visit(browser: Browser, address: str, allowed: str = "", **context: Any) -> Iterator[Visit]:
    """A visit of its own; at its end nothing was complained of but what holds `allowed`, and no other host was asked."""
    opened = browser.new_context(**({"color_scheme": "light"} | DESKTOP | context))
    page = opened.new_page()
    page.set_default_timeout(PATIENCE)
    visit = Visit(page, address)
    page.on("console", lambda said: visit.complaints.append(said.text) if said.type != "log" else None)
    page.on("pageerror", lambda error: visit.complaints.append(str(error)))
    page.on(
        "request", lambda asked: visit.strangers.append(asked.url) if _strange(asked.url, address) else None
    )
    yield visit
    opened.close()
    complaints = [said for said in visit.complaints if not allowed or allowed not in said]
    assert (complaints, visit.strangers) == ([], [])


def _strange(url: str, address: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme not in ("blob", "data") and parts.netloc != urlsplit(address).netloc


def shoot(page: Page, name: str, folder: Path | None = None, whole: bool = True) -> None:
    """Keep a picture of the page: in the folder that PALIMPSEST_SCREENSHOTS names, or in runs/console."""
    kept = folder or Path(os.environ.get("PALIMPSEST_SCREENSHOTS") or ROOT / "runs" / "console")
    page.screenshot(path=kept / f"{name}.png", full_page=whole, animations="disabled")
