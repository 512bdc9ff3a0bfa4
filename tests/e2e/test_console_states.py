"""The console with an API key, a stopped stream, failed jobs, and user text that contains markup."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, expect

from tests.support import chromium
from tests.support.application import TOWER, TestApp
from tests.support.chromium import open_page, save_screenshot
from tests.support.local_server import wait_until

MARKUP = "<img src=//a.b>"  #: as markup it would ask another host, which no visit may


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.open_browser() as browser:
        yield browser


@contextmanager
def serving(test_app: TestApp) -> Iterator[str]:
    """Serve the application on a free port and yield its address."""
    server = uvicorn.Server(
        uvicorn.Config(test_app.app, port=0, log_level="critical", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    test_app.close()


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, tmp_path: Path) -> None:
    """The page loads without an API key. A dialog asks for one, rejects a wrong one, and keeps a valid one in session
    storage."""
    test_app = TestApp(tmp_path, api_key="open-sesame-open")
    with serving(test_app) as address, open_page(browser, address, allowed="401") as found:
        page = found.open("ledger")
        box = page.get_by_role("dialog")
        expect(box).to_contain_text("API key required")
        assert found.accessibility_violations() == []
        save_screenshot(page, "key-box", full_page=False)
        box.get_by_label("API key").fill("wrong")
        box.get_by_role("button", name="Use key").click()
        expect(box.get_by_role("alert")).to_contain_text("unknown or revoked")
        box.get_by_label("API key").fill("open-sesame-open")
        box.get_by_role("button", name="Use key").click()
        expect(page.locator(".empty")).to_contain_text("The ledger is empty")
        assert page.evaluate(
            "[sessionStorage.length, Object.keys(localStorage).includes('palimpsest.key')]"
        ) == [1, False]
        page.get_by_role("link", name="Edit", exact=True).click()
        expect(page.locator(".empty")).to_contain_text("No edits yet")
        assert "sesame" not in page.url
        page.get_by_role("button", name="Forget key").click()
        expect(page.locator("#status")).to_have_text("needs a key")
        assert page.evaluate("sessionStorage.length") == 0


def test_a_dismissed_key_dialog_is_not_shown_again(browser: Browser, tmp_path: Path) -> None:
    """After the dialog is dismissed the page shows the error, and background requests do not open it again."""
    test_app = TestApp(tmp_path, api_key="open-sesame-open")
    with serving(test_app) as address, open_page(browser, address, allowed="401") as found:
        page = found.open("traces")
        page.get_by_role("button", name="Not now").click()
        expect(page.get_by_role("alert")).to_contain_text("Send an API key")
        page.wait_for_timeout(300)
        expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_streamed_generation_can_be_stopped(browser: Browser, tmp_path: Path) -> None:
    """The text generated before Stop stays visible with its version."""
    test_app = TestApp(tmp_path)
    worker = test_app.start_fake_worker()
    worker.may_finish.clear()
    with serving(test_app) as address, open_page(browser, address) as found:
        page = found.open("generate?prompt=The Eiffel Tower is in")
        expect(page.locator(".said")).to_have_text(" Pa")
        expect(page.locator(".badge")).to_have_text("version 0")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".answer footer")).to_have_text("stopped")
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        worker.may_finish.set()


def test_user_text_is_never_rendered_as_markup(browser: Browser, tmp_path: Path) -> None:
    """Markup in a subject, a prompt or an object is shown as text on every page."""
    test_app = TestApp(tmp_path)
    test_app.start_fake_worker()
    request = TOWER | {"subject": MARKUP, "target_new": MARKUP}
    with serving(test_app) as address, open_page(browser, address) as found:
        with httpx.Client(base_url=address, timeout=60) as http:
            edit = http.post("/edits", json=request, headers={"Prefer": "wait=20"}).json()
        assert edit["status"] == "applied"
        for path in ("edits", f"edits/{edit['id']}", "ledger", "workers"):
            page = found.open(path)
            expect(page.get_by_text(MARKUP).first).to_be_visible()
            assert page.locator("main img").count() == 0


def test_a_failed_job_can_be_retried(browser: Browser, tmp_path: Path) -> None:
    """A failed edit shows its error, and a button retries it."""
    test_app = TestApp(tmp_path)
    test_app.start_fake_worker()
    with serving(test_app) as address, open_page(browser, address) as found:
        with httpx.Client(base_url=address, timeout=60) as http:
            edit = http.post(
                "/edits", json=TOWER | {"target_new": "Atlantis"}, headers={"Prefer": "wait=20"}
            ).json()

            def ended_again() -> bool:
                return http.get(f"/edits/{edit['id']}").json()["ended"] not in (None, edit["ended"])

            page = found.open(f"edits/{edit['id']}")
            expect(page.locator(".problem")).to_contain_text("there is no such place")
            page.get_by_role("button", name="Retry").click()
            wait_until(ended_again)  # the page shows the error of the first attempt until then
        expect(page.locator(".problem")).to_contain_text("there is no such place")
        page = found.open("workers")
        page.get_by_role("radio", name="failed").check()
        expect(page.get_by_role("button", name="Retry")).to_be_visible()
